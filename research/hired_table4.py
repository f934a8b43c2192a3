"""Compares HiRED's Table 4 with the predictions of the roofline model: LLaVA-NeXT-7B on a Tesla P40.

The configuration equals the script published with the paper (run_HiRED_sys_report.py): float16, an image of 600 x 600
pixels, 15 new tokens, no newline tokens, float32 logits of all prompt positions (as in transformers at that time), and
no truncation of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from typing import Any

import jsonargparse

from tokenprune.experiments.bench.architectures import build_meta_model, load_architecture
from tokenprune.experiments.bench.cost.count import count_batch
from tokenprune.experiments.bench.cost.devices import GIB, find_device
from tokenprune.experiments.bench.cost.meter import FUSED
from tokenprune.experiments.bench.cost.roofline import Prediction, predict

TEXT_TOKENS = 60
"""Estimated number of text tokens of the script's prompt; Vicuna's tokenizer is not included here."""
NEW_TOKENS = 15
"""Number of tokens of an answer, ``max_new_tokens`` of the script."""


@dataclass(frozen=True)
class Published:
    """A row of the paper's Table 4.

    Args:
        batch: number of prompts in a batch.
        budget: share of the tokens.
        tokens_per_second: throughput; None, as the next two, if the paper reports OOM.
        ttft: seconds to the first token.
        peak_gib: peak of the allocated memory in GiB.
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
        published: the published row.
        eager: prediction with eager attention.
        fused: prediction with fused attention.
        native_ttft: predicted seconds to the first token at the native float16 rate of the P40.
    """

    published: Published
    eager: Prediction
    fused: Prediction
    native_ttft: float

    def scaled_ttft(self, efficiency: float) -> float:
        """Return the predicted seconds to the first token if kernels reach a share of the peak rates."""
        return self.eager.ttft.by_kernel / efficiency


def predict_rows(rows: Sequence[Published] = PUBLISHED, llm_layers: int | None = None) -> list[Row]:
    """Return published rows with their predictions.

    Args:
        rows: the published rows.
        llm_layers: number of LLM layers to keep; by default all.
    """
    device, predicted_rows = find_device("p40"), []
    config = load_architecture("llava-v1.6-vicuna-7b", llm_layers)
    eager, fused = build_meta_model(config), build_meta_model(config, attention=FUSED)
    for row in rows:
        counts = [
            count_batch(
                model, (600, 600), row.budget, row.batch, TEXT_TOKENS, newlines="drop", all_logits=True, encode_all=True
            )
            for model in (eager, fused)
        ]
        with_eager, with_fused = (predict(kernel_count, device, NEW_TOKENS) for kernel_count in counts)
        native = predict(counts[0], device, NEW_TOKENS, native=True).ttft.by_kernel
        predicted_rows.append(Row(row, with_eager, with_fused, native))
    return predicted_rows


def fit_efficiency(rows: Sequence[Row]) -> float:
    """Return the share of the peak rates in the first row, which is the only fitted number."""
    first = rows[0]
    assert first.published.ttft is not None
    return first.eager.ttft.by_kernel / first.published.ttft


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON records."""
    share = fit_efficiency(rows)
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
    share = fit_efficiency(rows)

    def error(predicted: float, published: float | None) -> str:
        return "" if published is None else f"{predicted / published - 1:+.0%}"

    def to_text(value: float | None) -> str:
        return "OOM" if value is None else f"{value:.2f}"

    lines = [
        "TTFT in seconds. Scaled: by kernel, with the efficiency that is fitted to the first row "
        f"({share:.1%} of both peaks).\n",
        "| batch | budget | published | fused | by kernel | error | scaled | error | at the float16 rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper, time, scaled = row.published, row.eager.ttft, row.scaled_ttft(share)
        lines.append(
            f"| {paper.batch} | {paper.budget:.0%} | {to_text(paper.ttft)} | {time.fused:.2f} | {time.by_kernel:.2f} | "
            f"{error(time.by_kernel, paper.ttft)} | {scaled:.2f} | {error(scaled, paper.ttft)} | "
            f"{row.native_ttft:.0f} |"
        )
    lines += [
        f"\nThroughput in tokens/s, {NEW_TOKENS} tokens of each prompt. Seconds per step: published time after "
        f"the first token, divided by the {NEW_TOKENS - 1} steps.\n",
        "| batch | budget | published | fused | by kernel | error | s per step, published | s per step, by kernel |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper, speed = row.published, row.eager.tokens_per_second
        seconds_per_step = ""
        if paper.tokens_per_second is not None and paper.ttft is not None:
            decode_seconds = paper.batch * NEW_TOKENS / paper.tokens_per_second - paper.ttft
            seconds_per_step = f"{decode_seconds / (NEW_TOKENS - 1):.3f}"
        lines.append(
            f"| {paper.batch} | {paper.budget:.0%} | {to_text(paper.tokens_per_second)} | {speed.fused:.2f} | "
            f"{speed.by_kernel:.2f} | {error(speed.by_kernel, paper.tokens_per_second)} | {seconds_per_step} | "
            f"{row.eager.decode.by_kernel:.3f} |"
        )
    lines += [
        "\nPeak memory in GiB.\n",
        "| batch | budget | published | fused attention | error | eager attention | error | eager fits 24 GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper, low, high = row.published, row.fused.peak_bytes / GIB, row.eager.peak_bytes / GIB
        lines.append(
            f"| {paper.batch} | {paper.budget:.0%} | {to_text(paper.peak_gib)} | {low:.2f} | "
            f"{error(low, paper.peak_gib)} | {high:.2f} | {error(high, paper.peak_gib)} | "
            f"{'yes' if row.eager.fits else 'no'} |"
        )
    return "\n".join(lines)


def main(json: bool = False) -> None:
    """Print HiRED's Table 4 with the predictions of the roofline model.

    Args:
        json: whether to print JSON instead of Markdown.
    """
    rows = predict_rows()
    print(dumps(as_records(rows), indent=2) if json else as_markdown(rows))


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
