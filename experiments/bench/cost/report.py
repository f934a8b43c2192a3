"""The command `tokenprune cost`: its options, its tables and its JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from tokenprune.budget import as_budget
from tokenprune.cli.errors import add_flag
from tokenprune.experiments.bench.architectures import architecture, on_meta
from tokenprune.experiments.bench.cost.count import Counted, count
from tokenprune.experiments.bench.cost.devices import DEVICES, GIB, Device, find_device
from tokenprune.experiments.bench.cost.meter import FUSED
from tokenprune.experiments.bench.cost.roofline import Bounds, Prediction, predict

ATTENTION = {"fused": FUSED, "eager": "eager"}
"""Attention functions by the name that the command gives them."""


def cost_parser() -> ArgumentParser:
    """Return the parser of `tokenprune cost`."""
    parser = ArgumentParser(
        prog="tokenprune cost",
        exit_on_error=False,
        allow_abbrev=False,
        description="Count what a model costs without running or downloading it, and predict time and memory for a "
        "table of devices from their datasheets (roofline).",
    )
    parser.add_argument("--model", default="llava-v1.6-vicuna-7b", help="name of a shipped architecture")
    parser.add_argument("--image-size", default="672x672", help="height x width of the images in pixels")
    parser.add_argument(
        "--budget",
        type=int | float | str,
        default=[0.2],
        nargs="+",
        help="budgets beside the full prompt: 0.2 or 20%% (ratios), 160 (tokens)",
    )
    parser.add_argument("--device", type=str, nargs="+", default=["all"], help=f"{', '.join(DEVICES)}, or all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts at once, with one image each")
    parser.add_argument("--text-tokens", type=int, default=60, help="tokens of a prompt beside its image")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16", help="what is stored")
    parser.add_argument(
        "--attention",
        choices=list(ATTENTION),
        default="fused",
        help="one kernel that writes no scores (what SDPA and flash attention run), or eager",
    )
    parser.add_argument("--efficiency", type=float, default=1.0, help="share of both peaks that is reached")
    parser.add_argument("--llm-layers", type=int, help="LLM layers to keep; all if left out")
    add_flag(parser, "--json", "print JSON")
    return parser


def run(config: Any) -> None:
    """Run the command.

    Args:
        config: the parsed options.

    Raises:
        LookupError: if a model or a device is not known.
        ValueError: if a size or a number makes no sense.
    """
    size, budgets = parse_size(config.image_size), [None, *map(as_budget, config.budget)]
    for name in ("batch", "text_tokens", "new_tokens"):
        values = getattr(config, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise ValueError(f"--{name.replace('_', '-')} counts from 1, not {values}")
    devices = list(DEVICES.values()) if "all" in config.device else [find_device(name) for name in config.device]
    model = on_meta(
        architecture(config.model, config.llm_layers), getattr(torch, config.dtype), ATTENTION[config.attention]
    )
    made = [
        count(model, size, budget, batch, config.text_tokens)
        for batch in config.batch
        for budget in dict.fromkeys(budgets)
    ]
    rows = [(counted, [predict_on(counted, device, config) for device in devices]) for counted in made]
    if config.json:
        print(json.dumps(as_json(config, rows), indent=2))
    else:
        as_tables(config, rows)


def predict_on(counted: Counted, device: Device, config: Any) -> Prediction:
    """Return the prediction for a batch with the options of the command."""
    return predict(counted, device, config.new_tokens, config.dtype, config.efficiency)


def parse_size(text: str) -> tuple[int, int]:
    """Return height x width of an image.

    Raises:
        ValueError: if the text says no size.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if found is None or min(int(found[1]), int(found[2])) < 1:
        raise ValueError(f"--image-size {text!r} is no size; write height x width in pixels, such as 672x672")
    return int(found[1]), int(found[2])


Rows = Sequence[tuple[Counted, Sequence[Prediction]]]
"""Each batch with its prediction for each device."""


def as_json(config: Any, rows: Rows) -> dict[str, Any]:
    """Return everything as plain numbers: FLOPs, bytes and seconds."""

    def bounds(value: Bounds) -> dict[str, float]:
        return {"fused": value.fused, "by_kernel": value.by_kernel}

    return {
        "model": config.model,
        "llm_layers": config.llm_layers,
        "image_size": list(parse_size(config.image_size)),
        "dtype": config.dtype,
        "attention": config.attention,
        "new_tokens": config.new_tokens,
        "efficiency": config.efficiency,
        "batches": [
            {
                "batch": counted.batch,
                "budget": None if counted.budget is None else counted.budget.number,
                "tokens": {**vars(counted.tokens), "prompt": counted.tokens.prompt},
                "weight_bytes": counted.weight_bytes,
                "kv_bytes": counted.kv_bytes,
                "activation_bytes": counted.peak_bytes(config.new_tokens) - counted.weight_bytes - counted.kv_bytes,
                "phases": {
                    name: {
                        "flops": work.flops,
                        "bytes_read_once": work.read_once,
                        "bytes_moved": work.moved,
                        "kernels": work.kernels.total(),
                        "peak_bytes": work.peak_bytes,
                    }
                    for name, work in counted.phases.items()
                },
                "tower_flops": counted.tower_flops,
                "projector_flops": counted.encode.flops - counted.tower_flops,
                "devices": [
                    {
                        "device": one.device.name,
                        "arithmetic": one.arithmetic,
                        "source": one.device.source,
                        "ttft_s": bounds(one.ttft),
                        "encode_s": bounds(one.encode),
                        "prefill_s": bounds(one.prefill),
                        "decode_s": bounds(one.decode),
                        "tokens_per_second": bounds(one.tokens_per_second),
                        "peak_bytes": one.peak_bytes,
                        "memory_bytes": one.device.memory,
                        "fits": one.fits,
                    }
                    for one in predictions
                ],
            }
            for counted, predictions in rows
        ],
    }


def as_tables(config: Any, rows: Rows) -> None:
    """Print what was counted, and what is predicted."""
    console = Console(width=max(Console().width, 132))
    cut = "" if config.llm_layers is None else f", LLM cut to {config.llm_layers} layers"
    work = Table(title=f"{config.model}{cut}, image {config.image_size}, {config.dtype}, {config.attention} attention")
    for name in ("batch", "budget", "prompt", "tower", "projector", "prefill", "decode step"):
        work.add_column(name, justify="right")
    for name in ("weights", "KV cache", "activations"):
        work.add_column(name, justify="right")
    for counted, _ in rows:
        peak = counted.peak_bytes(config.new_tokens)
        work.add_row(
            str(counted.batch),
            _budget(counted),
            str(counted.tokens.prompt),
            *(
                f"{flops / 1e12:.3f} T"
                for flops in (
                    counted.tower_flops,
                    counted.encode.flops - counted.tower_flops,
                    counted.prefill.flops,
                    counted.decode.flops,
                )
            ),
            *(
                f"{size / GIB:.2f} GiB"
                for size in (counted.weight_bytes, counted.kv_bytes, peak - counted.weight_bytes - counted.kv_bytes)
            ),
        )
    console.print(work)
    console.print(
        "tower, projector, prefill, decode step: FLOPs of the model's own forward on the meta device (FlopCounterMode; "
        "attention as the full square).\nactivations: most bytes alive at once beside weights and the prompt's cache.\n"
    )
    share = "" if config.efficiency == 1 else f" at {config.efficiency:.0%} of both peaks"
    table = Table(title=f"Roofline{share}, {config.new_tokens} new tokens: fused to by kernel")
    for name in ("device", "batch", "budget", "TTFT", "decode step", "tokens/s", "peak memory", "fits"):
        table.add_column(
            name, justify="left" if name in ("device", "fits") else "right", no_wrap=name in ("batch", "budget", "fits")
        )
    predictions = [(counted, one) for counted, found in rows for one in found]
    for counted, one in sorted(predictions, key=lambda pair: list(DEVICES.values()).index(pair[1].device)):
        table.add_row(
            one.device.name + ("" if one.arithmetic == config.dtype else " *"),
            str(counted.batch),
            _budget(counted),
            f"{_span(one.ttft, 1)} s",
            f"{_span(one.decode, 1e3)} ms",
            _span(one.tokens_per_second, 1),
            f"{one.peak_bytes / GIB:.1f} of {one.device.memory / GIB:.0f} GiB",
            "yes" if one.fits else "[red]out of memory[/red]",
        )
    console.print(table)
    if any(one.arithmetic != config.dtype for _, one in predictions):
        console.print(f"* torch multiplies {config.dtype} at the float32 rate there.")
    console.print(
        "fused: a phase reads what it needs once and computes at the peak; no program is faster. by kernel: every "
        "kernel\nreads and writes its tensors, each at a peak. Real runs are slower than both:\n"
        "docs/results/performance.md."
    )


def _budget(counted: Counted) -> str:
    if counted.budget is None:
        return "full"
    amount = counted.budget.number
    return f"{amount:.0%}" if isinstance(amount, float) else str(amount)


def _span(value: Bounds, factor: float) -> str:
    bounds = [one * factor for one in (value.fused, value.by_kernel)]
    digits = max(0, 2 - math.floor(math.log10(min(bounds))))
    return " to ".join(f"{one:,.{digits}f}" for one in bounds)
