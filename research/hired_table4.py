"""HiRED's Table 4 beside what is predicted for it: LLaVA-NeXT-7B on a Tesla P40.

The setting is that of the script published with the paper (run_HiRED_sys_report.py): float16, an image of 600 x 600,
15 new tokens, no newline tokens, logits of the whole prompt in float32 as transformers made them then, images encoded
whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from typing import Any

import jsonargparse

from tokenprune.experiments.bench.architectures import architecture, on_meta
from tokenprune.experiments.bench.cost.count import count
from tokenprune.experiments.bench.cost.devices import GIB, find_device
from tokenprune.experiments.bench.cost.meter import FUSED
from tokenprune.experiments.bench.cost.roofline import Prediction, predict

TEXT_TOKENS = 60
"""Tokens of the script's prompt beside the image, estimated: Vicuna's tokenizer is not shipped here."""
NEW_TOKENS = 15
"""Tokens of an answer, the script's ``max_new_tokens``."""


@dataclass(frozen=True)
class Published:
    """A row of the paper's Table 4.

    Args:
        batch: prompts at once.
        budget: share of the tokens.
        tokens_per_second: throughput; None where the paper says OOM, as for the two below.
        ttft: seconds to the first token.
        peak_gib: peak of allocated memory.
    """

    batch: int
    budget: float
    tokens_per_second: float | None = None
    ttft: float | None = None
    peak_gib: float | None = None


PUBLISHED = (
    Published(1, 1.0, 0.49, 19.49, 16.04),
    Published(1, 0.4, 1.40, 6.91, 14.33),
    Published(1, 0.2, 2.30, 4.21, 13.76),
    Published(2, 1.0, 0.66, 44.37, 21.84),
    Published(2, 0.4, 2.04, 14.31, 16.81),
    Published(2, 0.2, 3.68, 7.89, 15.07),
    Published(4, 1.0),
    Published(4, 0.4, 2.22, 26.38, 20.36),
    Published(4, 0.2, 4.28, 13.60, 16.99),
)


@dataclass(frozen=True)
class Row:
    """A published row and its predictions.

    Args:
        published: the row.
        eager: prediction with eager attention.
        fused: prediction with fused attention.
        native_ttft: seconds to the first token at the P40's own float16 rate.
    """

    published: Published
    eager: Prediction
    fused: Prediction
    native_ttft: float

    def scaled_ttft(self, efficiency: float) -> float:
        """Return the predicted seconds to the first token if kernels reach a share of the peaks."""
        return self.eager.ttft.by_kernel / efficiency


def compare(rows: Sequence[Published] = PUBLISHED, llm_layers: int | None = None) -> list[Row]:
    """Predict published rows.

    Args:
        rows: the rows.
        llm_layers: LLM layers to keep; all if left out.
    """
    device, found = find_device("p40"), []
    config = architecture("llava-v1.6-vicuna-7b", llm_layers)
    eager, fused = on_meta(config), on_meta(config, attention=FUSED)
    for row in rows:
        made = [
            count(model, (600, 600), row.budget, row.batch, TEXT_TOKENS, newlines="drop", all_logits=True, whole=True)
            for model in (eager, fused)
        ]
        with_eager, with_fused = (predict(one, device, NEW_TOKENS) for one in made)
        native = predict(made[0], device, NEW_TOKENS, native=True).ttft.by_kernel
        found.append(Row(row, with_eager, with_fused, native))
    return found


def efficiency_of(rows: Sequence[Row]) -> float:
    """Return the share of the peaks that the first row reached: the one number that is fitted."""
    first = rows[0]
    assert first.published.ttft is not None
    return first.eager.ttft.by_kernel / first.published.ttft


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain numbers."""
    share = efficiency_of(rows)
    return [
        {
            "batch": row.published.batch,
            "budget": row.published.budget,
            "ttft_s": {
                "published": row.published.ttft,
                "fused": row.eager.ttft.fused,
                "by_kernel": row.eager.ttft.by_kernel,
                "scaled": row.scaled_ttft(share),
                "float16_rate": row.native_ttft,
            },
            "tokens_per_second": {
                "published": row.published.tokens_per_second,
                "fused": row.eager.tokens_per_second.fused,
                "by_kernel": row.eager.tokens_per_second.by_kernel,
            },
            "peak_gib": {
                "published": row.published.peak_gib,
                "fused_attention": row.fused.peak_bytes / GIB,
                "eager_attention": row.eager.peak_bytes / GIB,
                "eager_fits": row.eager.fits,
            },
        }
        for row in rows
    ]


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the comparison as three Markdown tables: time, throughput, memory."""
    share = efficiency_of(rows)

    def error(predicted: float, published: float | None) -> str:
        return "" if published is None else f"{predicted / published - 1:+.0%}"

    def of(value: float | None) -> str:
        return "OOM" if value is None else f"{value:.2f}"

    lines = [
        "TTFT in seconds. Scaled: by kernel at the one efficiency at which the first row is right "
        f"({share:.1%} of both peaks).\n",
        "| batch | budget | published | fused | by kernel | error | scaled | error | at the float16 rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        was, time, scaled = row.published, row.eager.ttft, row.scaled_ttft(share)
        lines.append(
            f"| {was.batch} | {was.budget:.0%} | {of(was.ttft)} | {time.fused:.2f} | {time.by_kernel:.2f} | "
            f"{error(time.by_kernel, was.ttft)} | {scaled:.2f} | {error(scaled, was.ttft)} | {row.native_ttft:.0f} |"
        )
    lines += [
        f"\nThroughput in tokens/s, {NEW_TOKENS} tokens of each prompt. Seconds a step: what the published numbers "
        f"leave for each of the {NEW_TOKENS - 1} steps after the first token.\n",
        "| batch | budget | published | fused | by kernel | error | s a step, published | s a step, by kernel |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        was, speed = row.published, row.eager.tokens_per_second
        left = ""
        if was.tokens_per_second is not None and was.ttft is not None:
            left = f"{(was.batch * NEW_TOKENS / was.tokens_per_second - was.ttft) / (NEW_TOKENS - 1):.3f}"
        lines.append(
            f"| {was.batch} | {was.budget:.0%} | {of(was.tokens_per_second)} | {speed.fused:.2f} | "
            f"{speed.by_kernel:.2f} | {error(speed.by_kernel, was.tokens_per_second)} | {left} | "
            f"{row.eager.decode.by_kernel:.3f} |"
        )
    lines += [
        "\nPeak memory in GiB.\n",
        "| batch | budget | published | fused attention | error | eager attention | error | eager fits 24 GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        was, low, high = row.published, row.fused.peak_bytes / GIB, row.eager.peak_bytes / GIB
        lines.append(
            f"| {was.batch} | {was.budget:.0%} | {of(was.peak_gib)} | {low:.2f} | {error(low, was.peak_gib)} | "
            f"{high:.2f} | {error(high, was.peak_gib)} | {'yes' if row.eager.fits else 'no'} |"
        )
    return "\n".join(lines)


def main(json: bool = False) -> None:
    """Print HiRED's Table 4 beside the prediction of the roofline model.

    Args:
        json: print JSON instead of Markdown.
    """
    rows = compare()
    print(dumps(as_records(rows), indent=2) if json else as_markdown(rows))


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
