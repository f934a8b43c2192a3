"""Implements the command `tokenprune cost`: its configuration, tables and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from tokenprune.budget import as_budget, format_budget, parse_amount
from tokenprune.cli.options import parse_reducer
from tokenprune.configuration import as_config
from tokenprune.cuts import Cut
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.experiments.bench.architectures import build_meta_model, load_architecture
from tokenprune.experiments.bench.bench_model import parse_image_size
from tokenprune.experiments.bench.cost.count import BatchCost, count_batch
from tokenprune.experiments.bench.cost.devices import DEVICES, GIB, Device, find_device
from tokenprune.experiments.bench.cost.meter import FUSED
from tokenprune.experiments.bench.cost.roofline import Bounds, Prediction, predict

ATTENTION = {"fused": FUSED, "eager": "eager"}
"""Names of attention functions in transformers, by the value of ``--attention``."""


@dataclass(frozen=True)
class CostConfig:
    """Options of `tokenprune cost`.

    Args:
        model: name of a shipped architecture.
        image_size: height x width of the images in pixels.
        budget: budgets, in addition to the full prompt: 0.2 or 20% (ratios; 1.0 or 100% keeps all tokens), 160 (tokens;
            1 keeps one token).
        cut: cuts inside the LLM as layer:budget, such as 2:50%; the budget is a ratio of the tokens that entered the
            LLM, or a number of tokens. Every budget is also counted with these cuts.
        tower: strategies inside the vision tower as calls, such as "ToMe(r=8)". Every budget is also counted with each
            of them.
        device: names of devices, or all.
        batch: prompts per batch, with one image each.
        text_tokens: text tokens of each prompt.
        new_tokens: new tokens of each prompt.
        dtype: data type of weights.
        attention: fused: one kernel that writes no scores, like SDPA and flash attention; or eager.
        efficiency: reached share of peak arithmetic and peak bandwidth.
        llm_layers: LLM layers to keep; all by default.
        json: print JSON.
    """

    model: str = "llava-v1.6-vicuna-7b"
    image_size: str = "672x672"
    budget: list[int | float | str] = field(default_factory=lambda: [0.2])
    cut: list[str] = field(default_factory=list)
    tower: list[str] = field(default_factory=list)
    device: list[str] = field(default_factory=lambda: ["all"], metadata={"help": f"{', '.join(DEVICES)}, or all"})
    batch: list[int] = field(default_factory=lambda: [1])
    text_tokens: int = 60
    new_tokens: int = 32
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    attention: Literal["fused", "eager"] = "fused"
    efficiency: float = 1.0
    llm_layers: int | None = None
    json: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return parse_image_size(self.image_size, "--image-size")


def run(config: CostConfig) -> None:
    """Run the command.

    Args:
        config: the options.

    Raises:
        LookupError: if there is no such architecture or device.
        ValueError: if a size, budget or number is not valid.
    """
    size, budgets = config.size, [None, *map(as_budget, config.budget)]
    for name in ("batch", "text_tokens", "new_tokens"):
        values = getattr(config, name)
        smallest = min(values if isinstance(values, list) else [values])
        if smallest < 1:
            raise ValueError(f"--{name.replace('_', '-')} {smallest}: give at least 1")
    devices = list(DEVICES.values()) if "all" in config.device else [find_device(name) for name in config.device]
    architecture = load_architecture(config.model, config.llm_layers)
    model = build_meta_model(architecture, getattr(torch, config.dtype), ATTENTION[config.attention])
    cuts = [parse_cut(text) for text in config.cut]
    towers = [None, *map(parse_tower, config.tower)]
    costs = [
        count_batch(model, size, budget, batch, config.text_tokens, cuts=parts, tower=tower)
        for batch in config.batch
        for budget in dict.fromkeys(budgets)
        for tower in towers
        for parts in ([(), cuts] if cuts else [()])
    ]
    rows = [(cost, [predict_with_options(cost, device, config) for device in devices]) for cost in costs]
    if config.json:
        print(json.dumps(as_json(config, rows), indent=2))
    else:
        print_tables(config, rows)


def predict_with_options(cost: BatchCost, device: Device, config: CostConfig) -> Prediction:
    """Return the prediction for a batch on a device, with the options of the command."""
    return predict(cost, device, config.new_tokens, config.dtype, config.efficiency)


Rows = Sequence[tuple[BatchCost, Sequence[Prediction]]]
"""Costs of batches, each with its prediction for each device."""


def as_json(config: CostConfig, rows: Rows) -> dict[str, Any]:
    """Return the options, costs and predictions as plain data: FLOPs, bytes and seconds."""

    def bounds_as_json(bounds: Bounds) -> dict[str, float]:
        return {"fused": bounds.fused, "by_kernel": bounds.by_kernel}

    return {
        "model": config.model,
        "llm_layers": config.llm_layers,
        "image_size": list(config.size),
        "dtype": config.dtype,
        "attention": config.attention,
        "new_tokens": config.new_tokens,
        "efficiency": config.efficiency,
        "batches": [
            {
                "batch": cost.batch,
                "budget": None if cost.budget is None else cost.budget.number,
                "cuts": [{"layer": cut.layer, "budget": cut.budget} for cut in cost.cuts],
                "tower": None if cost.tower is None else as_config(cost.tower),
                "tokens": {**vars(cost.tokens), "prompt": cost.tokens.prompt},
                "weight_bytes": cost.weight_bytes,
                "kv_bytes": cost.kv_bytes,
                "activation_bytes": cost.peak_bytes(config.new_tokens) - cost.weight_bytes - cost.kv_bytes,
                "phases": {
                    name: {
                        "flops": work.flops,
                        "bytes_read_once": work.read_once,
                        "bytes_moved": work.moved,
                        "kernels": work.kernels.total(),
                        "peak_bytes": work.peak_bytes,
                    }
                    for name, work in cost.phases.items()
                },
                "tower_flops": cost.tower_flops,
                "projector_flops": cost.encode.flops - cost.tower_flops,
                "devices": [
                    {
                        "device": prediction.device.name,
                        "arithmetic": prediction.arithmetic,
                        "source": prediction.device.source,
                        "ttft_s": bounds_as_json(prediction.ttft),
                        "encode_s": bounds_as_json(prediction.encode),
                        "prefill_s": bounds_as_json(prediction.prefill),
                        "decode_s": bounds_as_json(prediction.decode),
                        "tokens_per_second": bounds_as_json(prediction.tokens_per_second),
                        "peak_bytes": prediction.peak_bytes,
                        "memory_bytes": prediction.device.memory,
                        "fits": prediction.fits,
                    }
                    for prediction in predictions
                ],
            }
            for cost, predictions in rows
        ],
    }


def print_tables(config: CostConfig, rows: Rows) -> None:
    """Print a table of counted costs and a table of predictions."""
    console = Console(width=max(Console().width, 132))
    cut = "" if config.llm_layers is None else f", LLM cut to {config.llm_layers} layers"
    cost_table = Table(
        title=f"{config.model}{cut}, image {config.image_size}, {config.dtype}, {config.attention} attention"
    )
    for name in ("batch", "budget", "prompt", "tower", "projector", "prefill", "decode step"):
        cost_table.add_column(name, justify="right")
    for name in ("weights", "KV cache", "activations"):
        cost_table.add_column(name, justify="right")
    for cost, _ in rows:
        peak = cost.peak_bytes(config.new_tokens)
        cost_table.add_row(
            str(cost.batch),
            _format_budget(cost),
            str(cost.tokens.prompt),
            *(
                format_flops(flops)
                for flops in (
                    cost.tower_flops,
                    cost.encode.flops - cost.tower_flops,
                    cost.prefill.flops,
                    cost.decode.flops,
                )
            ),
            *(
                f"{size / GIB:.2f} GiB"
                for size in (cost.weight_bytes, cost.kv_bytes, peak - cost.weight_bytes - cost.kv_bytes)
            ),
        )
    console.print(cost_table)
    console.print(
        "tower, projector, prefill, decode step: FLOPs of the model's own forward on the meta device (FlopCounterMode; "
        "attention as the full square).\nactivations: most live bytes, without weights and the prompt's cache.\n"
    )
    share = "" if config.efficiency == 1 else f" at {config.efficiency:.0%} of both peaks"
    table = Table(title=f"Roofline{share}, {config.new_tokens} new tokens: between the bounds fused and by kernel")
    for name in ("device", "batch", "budget", "TTFT", "decode step", "tokens/s", "peak memory", "fits"):
        table.add_column(
            name, justify="left" if name in ("device", "fits") else "right", no_wrap=name in ("batch", "budget", "fits")
        )
    pairs = [(cost, prediction) for cost, predictions in rows for prediction in predictions]
    for cost, prediction in sorted(pairs, key=lambda pair: list(DEVICES.values()).index(pair[1].device)):
        table.add_row(
            prediction.device.name + ("" if prediction.arithmetic == config.dtype else " *"),
            str(cost.batch),
            _format_budget(cost),
            f"{format_bounds(prediction.ttft, 1)} s",
            f"{format_bounds(prediction.decode, 1e3)} ms",
            format_bounds(prediction.tokens_per_second, 1),
            f"{prediction.peak_bytes / GIB:.1f} of {prediction.device.memory / GIB:.0f} GiB",
            "yes" if prediction.fits else "[red]out of memory[/red]",
        )
    console.print(table)
    if any(prediction.arithmetic != config.dtype for _, prediction in pairs):
        console.print(f"* torch multiplies {config.dtype} at the float32 rate there.")
    console.print(
        "fused (less time, more tokens/s): a phase reads its inputs once and computes at the peak; no program is "
        "faster.\nby kernel: every "
        "kernel\nreads and writes its tensors, each at a peak. Real runs are slower than both:\n"
        "docs/explanation/benchmark-method.md."
    )


def _format_budget(cost: BatchCost) -> str:
    """Return the strategy inside the tower, the budget before the LLM, and the budget of each cut with its layer."""
    tower = [] if cost.tower is None else [f"{cost.tower.label} {cost.tower.budget_label}"]
    entering = "full" if cost.budget is None else format_budget(cost.budget)
    return " + ".join([*tower, entering, *(f"{format_budget(cut.budget)} from layer {cut.layer}" for cut in cost.cuts)])


def parse_cut(text: str) -> Cut:
    """Return a cut from a text such as ``"2:50%"``.

    Args:
        text: layer and budget, separated by a colon.

    Raises:
        ValueError: if the text is no cut.
    """
    layer, _, amount = text.partition(":")
    try:
        number = float(layer) if "." in layer else int(layer)
        budget = amount if "%" in amount else float(amount) if "." in amount else int(amount)
        return Cut(number, parse_amount(budget))
    except ValueError as error:
        raise ValueError(
            f"--cut {text!r} is not layer:budget; write the first layer without the dropped tokens and what remains, "
            "such as 2:50% or 2:0.5 (a ratio of the tokens that entered the LLM) or 2:100 (tokens)"
        ) from error


def parse_tower(text: str) -> EncoderReducer:
    """Return a strategy inside the vision tower from a call such as ``"ToMe(r=8)"``.

    Args:
        text: the call.

    Raises:
        ValueError: if the strategy has another stage.
    """
    reducer = parse_reducer(["--reducer", text])
    if not isinstance(reducer, EncoderReducer):
        raise ValueError(
            f"--tower {text!r} acts at the stage {reducer.stage}, not inside the vision tower; write a strategy such "
            'as "ToMe(r=8)", and budgets before and inside the LLM as --budget and --cut'
        )
    return reducer


def format_flops(flops: float) -> str:
    """Return a number of FLOPs with three significant digits and a prefix: ``"43.4 T"``, ``"14.9 G"``."""
    prefix, unit = next(((p, u) for p, u in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if flops >= u), ("", 1.0))
    value = flops / unit
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {prefix}".strip()


def format_bounds(bounds: Bounds, factor: float) -> str:
    """Return two bounds, the smaller one first."""
    values = sorted(bound * factor for bound in (bounds.fused, bounds.by_kernel))
    digits = max(0, 2 - math.floor(math.log10(min(values))))
    return " to ".join(f"{value:,.{digits}f}" for value in values)
