"""Formats the result of `tokenprune bench run` as tables and a figure, from its JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune.experiments.analysis.report.style import FULL, INK, PALETTE
from tokenprune.experiments.bench.phase_timer import FIRST_TOKEN_PHASES, MEANING, PHASES

Result = Mapping[str, Any]
"""A result, or a part of one: the value of `as_data`, or JSON read from a file."""

COLORS: Mapping[str, str] = {
    "preprocess": "#7F7F7F",
    "vision encode": PALETTE[0],
    "signal capture": PALETTE[1],
    "projector": PALETTE[5],
    "packing": PALETTE[9],
    "reducer": PALETTE[3],
    "rewrite": PALETTE[4],
    "generate": "#BBBBBB",
    "prefill": PALETTE[2],
    "decode": PALETTE[6],
}
"""One color per phase, from the palette of the reports."""


def format_number(value: float) -> str:
    """Return a number with three significant digits."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def format_quartiles(samples: Result) -> str:
    """Return a median with its quartiles."""
    low, high = samples["quartiles"]
    return f"{format_number(samples['median'])} [{format_number(low)}, {format_number(high)}]"


def format_ratio(ratio: Result) -> str:
    """Return a ratio with its interval."""
    low, high = ratio["interval"]
    return f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]"


def format_percent(ratio: Result) -> str:
    """Return a ratio with its interval in percent."""
    low, high = ratio["interval"]
    return f"{100 * ratio['median']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def describe_run(result: Result) -> list[str]:
    """Return a line about the model and a line about the machine."""
    model, machine = result["model"], result["environment"]
    layers = f"{model['llm_layers']} of {model['llm_layers_full']} LLM layers" if model["cut"] else "all LLM layers"
    weights = "random weights" if model["weights"] == "random" else "weights of the checkpoint"
    kernels = ", ".join(f"{part} {name}" for part, name in model["attention"].items() if name)
    return [
        f"{model['name']}: {model['class']}, {layers}, {weights}, {model['parameters'] / 1e6:,.1f} M parameters, "
        f"{model['dtype']}, attention: {kernels}",
        f"{machine['device']} ({machine['device_name']}), {machine['threads']} CPU threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, tokenprune {machine['tokenprune']}"
        + (f", CUDA {machine['cuda']}" if machine["cuda"] else ""),
    ]


def describe_conditions(result: Result) -> list[str]:
    """Return the lines above the tables: model, machine, protocol, and warnings about the numbers."""
    model, protocol = result["model"], result["protocol"]
    lines = [
        *describe_run(result),
        f"{protocol['tokens']} new tokens a prompt, {protocol['repeats']} rounds in turns after {protocol['warmup']} "
        "to warm up; medians and [quartiles]; ratios are plain / variant (release-like / variant, where stated) in the "
        "same round, with an interval that "
        f"covers the true median with {100 * result['coverage']:.0f} %",
    ]
    if model["cut"]:
        lines.append(
            f"CUT: {model['llm_layers_full'] - model['llm_layers']} LLM layers are missing, so prefill, decoding, the "
            "cache and every total are smaller than those of the real model"
        )
    if result["omitted"]:
        lines.append(f"omitted: {result['omitted']}")
    if any("flash_attention" in str(name) for name in model["attention"].values()):
        lines.append("FLOPs: torch does not see those inside kernels of the package flash-attn")
    return lines


Tables = dict[str, list[list[str]]]
"""Tables by title; the first row names the columns."""


def build_overview_tables(workload: Result) -> Tables:
    """Return the tables of a workload that have one row per variant.

    Columns of counts are empty if nothing was counted. Columns of the release-like baseline exist if it was measured,
    and the table of the vision tower if a strategy reduced patches.

    Args:
        workload: an element of the result's ``"settings"``.
    """
    has_baseline = any(variant.get("release_ratios") for variant in workload["variants"])
    over_baseline = ["speed-up over release-like"] if has_baseline else []
    launches: Result = next((variant["launches"] for variant in workload["variants"] if variant.get("launches")), {})
    heads = {
        "encode": [
            "encode, ms",
            "speed-up",
            *over_baseline,
            "FLOP ratio",
            "capture + reducer + rewrite, % of plain vision encode",
        ],
        "vision tower": ["patches x layers, % of all", "tower FLOPs, % of plain", "encode time, % of plain"],
        "encode and prefill": [
            "visual tokens",
            "encode + prefill, ms",
            "speed-up",
            *over_baseline,
            "FLOP ratio",
            "attained",
        ],
        "generation": ["TTFT, ms", "speed-up", *over_baseline, "ms per decode step", "new tokens/s"],
        "work and memory": ["prompt", "TFLOP to 1st token", "KV cache, MB", "tensors alive, MB", "peak memory, MB"],
    }
    if not any(variant.get("tower_patches_share") for variant in workload["variants"]):
        del heads["vision tower"]
    if launches:
        heads["work of the host up to the 1st token"] = list(launches)
    tables = {name: [["variant", *head]] for name, head in heads.items()}
    for variant in workload["variants"]:
        if variant["error"] is not None:
            for name, head in heads.items():
                tables[name].append([variant["name"], variant["error"], *[""] * (len(head) - 1)])
            continue
        measures, ratios, release_ratios = variant["measures"], variant.get("ratios"), variant.get("release_ratios")

        def compare_to_baseline(name: str, ratios: Result | None = release_ratios) -> list[str]:
            return [format_ratio(ratios[name]) if ratios else ""] if has_baseline else []

        cells = {
            "encode": [
                format_quartiles(measures["encode_ms"]),
                format_ratio(ratios["encode"]) if ratios else "",
                *compare_to_baseline("encode"),
                format_optional(ratios and ratios["flops_encode"]),
                format_percent(ratios["own_share_of_vision_encode"]) if ratios else "",
            ],
            "vision tower": [
                format_share(variant.get("tower_patches_share")),
                format_share(ratios and ratios["tower_flops_share"]),
                format_percent(ratios["encode_time_share"]) if ratios else "",
            ],
            "encode and prefill": [
                f"{variant['visual_tokens']:,}",
                format_quartiles(measures["encode_prefill_ms"]),
                format_ratio(ratios["encode_prefill"]) if ratios else "",
                *compare_to_baseline("encode_prefill"),
                format_optional(ratios and ratios["flops_to_first_token"]),
                format_optional(ratios and ratios["attained"]),
            ],
            "generation": [
                format_quartiles(measures["ttft_ms"]),
                format_ratio(ratios["ttft"]) if ratios else "",
                *compare_to_baseline("ttft"),
                format_quartiles(measures["decode_ms_per_token"]),
                format_quartiles(measures["new_tokens_per_s"]),
            ],
            "work and memory": [
                f"{variant['prompt_length']:,}",
                f"{variant['flops']['to_first_token'] / 1e12:.4g}" if variant["flops"] else "",
                format_number(variant["kv_bytes"] / 1e6),
                format_number(variant["memory"]["tensors"] / 1e6) if "tensors" in variant["memory"] else "",
                format_memory(variant["memory"]),
            ],
        }
        if launches:
            numbers = variant["launches"] or {}
            cells["work of the host up to the 1st token"] = [
                f"{numbers[name]:,}" if name in numbers else "" for name in launches
            ]
        for name in heads:
            tables[name].append([variant["name"], *cells[name]])
    return tables


def format_share(share: float | None) -> str:
    """Return a share in percent with one decimal, or an empty text if it is missing."""
    return "" if share is None else f"{100 * share:.1f}"


def format_optional(ratio: float | None) -> str:
    """Return a ratio with two decimals, or an empty text if it is missing."""
    return "" if ratio is None else f"{ratio:.2f}"


def format_memory(memory: Result) -> str:
    """Return the peak in MB: allocated / reserved on CUDA; resident, with the increase during the call, on a CPU."""
    if "allocated" in memory:
        return f"{format_number(memory['allocated'] / 1e6)} / {format_number(memory['reserved'] / 1e6)}"
    if "resident" in memory:
        increase = memory["resident"] - memory["resident_before"]
        return f"{format_number(memory['resident'] / 1e6)} (+{format_number(increase / 1e6)})"
    return "not known"


def build_phase_tables(workload: Result, quartiles: bool) -> Tables:
    """Return the milliseconds and counted FLOPs of a workload, with a row per phase and a column per variant.

    Args:
        workload: an element of the result's ``"settings"``.
        quartiles: whether to add quartiles to the medians.
    """
    variants = [variant for variant in workload["variants"] if variant["error"] is None]
    head = ["phase", *(variant["name"] for variant in variants)]
    counted = [variant for variant in variants if variant["flops"]]
    times, flops = [head], [["phase", *(variant["name"] for variant in counted)]]
    for phase in PHASES:
        samples = [variant["phases_ms"][phase] for variant in variants]
        cells = [format_quartiles(entry) if quartiles else format_number(entry["median"]) for entry in samples]
        times.append([phase, *cells])
        flops.append([phase, *(f"{variant['flops']['phases'].get(phase, 0) / 1e9:.4g}" for variant in counted)])
    tables = {"phases, ms": times}
    return tables if not counted else tables | {"phases, GFLOP (decode: one step)": flops}


def format_title(workload: Result) -> str:
    """Return the batch and the image size of a workload as a title."""
    return f"batch {workload['batch']}, {workload['height']} x {workload['width']} pixels"


def print_tables(result: Result, console: Console) -> None:
    """Print all tables, without the quartiles of the phases, which only the files contain."""
    for line in describe_conditions(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for workload in result["settings"]:
        for name, rows in {**build_overview_tables(workload), **build_phase_tables(workload, quartiles=False)}.items():
            table = Table(title=f"{format_title(workload)}: {name}", title_justify="left")
            width = max(len(row[0]) for row in rows)
            table.add_column(rows[0][0], min_width=min(width, 30), overflow="fold")
            for column in rows[0][1:]:
                table.add_column(column, justify="right", overflow="fold")
            for row in rows[1:]:
                table.add_row(*map(escape, row))
            console.print(table)


def as_markdown(result: Result) -> str:
    """Return all tables as Markdown."""
    parts = ["\n".join(f"- {line}" for line in describe_conditions(result))]
    for workload in result["settings"]:
        parts.append(f"## {format_title(workload)}")
        for name, rows in {**build_overview_tables(workload), **build_phase_tables(workload, quartiles=True)}.items():
            head, *body = ["| " + " | ".join(row) + " |" for row in rows]
            parts.append("\n".join([f"{name}:\n", head, "|" + "---|" * len(rows[0]), *body]))
    meanings = [f"- **{phase}**: {MEANING[phase]}" for phase in PHASES]
    return "\n\n".join([*parts, "Phases:\n\n" + "\n".join(meanings)]) + "\n"


def draw_phases(result: Result) -> Figure:
    """Draw the phases of every workload: stacked up to the first token, with a decoding step next to them."""
    workloads: Sequence[Result] = [
        workload for workload in result["settings"] if any(variant["error"] is None for variant in workload["variants"])
    ]
    heights = [1.1 + 0.3 * sum(variant["error"] is None for variant in entry["variants"]) for entry in workloads]
    figure = Figure(figsize=(11.0, 1.2 + sum(heights)), dpi=150, layout="constrained")
    if not workloads:
        return figure
    panels = figure.subplots(len(workloads), 2, squeeze=False, width_ratios=[3, 1], height_ratios=heights)
    for (left, right), workload in zip(panels, workloads, strict=True):
        _draw_panel(left, right, workload)
    left, right = panels[-1]
    left.set_xlabel("ms up to the first token, medians; line: quartiles of the time to first token")
    right.set_xlabel("ms per decoding step")
    machine = result["environment"]
    figure.suptitle(f"{result['model']['name']} on {machine['device_name']} ({machine['device']})", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=7.5, frameon=False)
    return figure


def _draw_panel(left: Axes, right: Axes, workload: Result) -> None:
    """Draw one workload: phases up to the first token on the left, a decoding step on the right."""
    variants = [variant for variant in workload["variants"] if variant["error"] is None]
    names = [variant["name"] for variant in variants]
    start = [0.0] * len(variants)
    for phase in ("preprocess", *FIRST_TOKEN_PHASES):
        medians = [variant["phases_ms"][phase]["median"] for variant in variants]
        left.barh(names, medians, left=start, color=COLORS[phase], label=phase, height=0.7)
        start = [position + width for position, width in zip(start, medians, strict=True)]
    for row, variant in enumerate(variants):
        preprocess = variant["phases_ms"]["preprocess"]["median"]
        low, high = variant["measures"]["ttft_ms"]["quartiles"]
        ends = [preprocess + low, preprocess + high]
        left.plot(ends, [row, row], color=FULL, lw=1.2, marker="|", markersize=5)
    steps = [variant["measures"]["decode_ms_per_token"] for variant in variants]
    errors = [
        [step["median"] - step["quartiles"][0] for step in steps],
        [step["quartiles"][1] - step["median"] for step in steps],
    ]
    right.barh(names, [step["median"] for step in steps], xerr=errors, color=COLORS["decode"], height=0.7, ecolor=FULL)
    right.set_yticks([])
    left.set_title(format_title(workload), fontsize=10, loc="left")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.grid(axis="x", color="#EEEEEE", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8)


def write_report(result: Result, folder: Path) -> list[Path]:
    """Write the JSON, Markdown and figure files of a result to a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("bench.json", "bench.md", "phases.png")]
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    files[1].write_text(as_markdown(result))
    draw_phases(result).savefig(files[2])
    return files
