"""The results of `tokenprune bench run` for people: tables and a figure, made from the JSON alone."""

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
from tokenprune.experiments.bench.phase_timer import BEFORE, MEANING, PHASES

Result = Mapping[str, Any]
"""What `as_data` of a measurement returned, or the JSON that was read back."""

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
"""One color per phase, out of the palette of the reports."""


def number(value: float) -> str:
    """Return a number with three digits that count."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def spread(found: Result) -> str:
    """Return a median with its quartiles."""
    low, high = found["quartiles"]
    return f"{number(found['median'])} [{number(low)}, {number(high)}]"


def ratio(found: Result) -> str:
    """Return a ratio with its interval."""
    low, high = found["interval"]
    return f"{found['median']:.2f} [{low:.2f}, {high:.2f}]"


def percent(found: Result) -> str:
    """Return a ratio with its interval in percent."""
    low, high = found["interval"]
    return f"{100 * found['median']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def what_ran(result: Result) -> list[str]:
    """Return which model ran on which machine, a line each."""
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


def headline(result: Result) -> list[str]:
    """Return what a reader must know before the numbers, a line each."""
    model, protocol = result["model"], result["protocol"]
    lines = [
        *what_ran(result),
        f"{protocol['tokens']} new tokens a prompt, {protocol['repeats']} rounds in turns after {protocol['warmup']} "
        "to warm up; medians and [quartiles]; ratios are plain / variant in the same round, with an interval that "
        f"covers the true median with {100 * result['coverage']:.0f} %",
    ]
    if model["cut"]:
        lines.append(
            f"CUT: {model['llm_layers_full'] - model['llm_layers']} LLM layers are missing, so prefill, decoding, the "
            "cache and every total are smaller than those of the real model"
        )
    if any("flash_attention" in str(name) for name in model["attention"].values()):
        lines.append("FLOPs: torch does not see those inside kernels of the package flash-attn")
    return lines


Tables = dict[str, list[list[str]]]
"""Tables by title; the first row names the columns."""


def overview(setting: Result) -> Tables:
    """Return the tables of a setting with a row for each variant."""
    heads = {
        "encode": ["encode, ms", "speed-up", "FLOP ratio", "capture + reducer + rewrite, % of plain vision encode"],
        "encode and prefill": ["visual tokens", "encode + prefill, ms", "speed-up", "FLOP ratio", "attained"],
        "generation": ["TTFT, ms", "speed-up", "ms per decode step", "new tokens/s"],
        "work and memory": ["prompt", "TFLOP to 1st token", "KV cache, MB", "tensors alive, MB", "peak memory, MB"],
    }
    tables = {name: [["variant", *head]] for name, head in heads.items()}
    for one in setting["variants"]:
        if one["error"] is not None:
            for name, head in heads.items():
                tables[name].append([one["name"], one["error"], *[""] * (len(head) - 1)])
            continue
        took, against = one["measures"], one.get("ratios")
        cells = {
            "encode": [
                spread(took["encode_ms"]),
                ratio(against["encode"]) if against else "",
                f"{against['flops_encode']:.2f}" if against else "",
                percent(against["own_share_of_vision_encode"]) if against else "",
            ],
            "encode and prefill": [
                f"{one['visual_tokens']:,}",
                spread(took["encode_prefill_ms"]),
                ratio(against["encode_prefill"]) if against else "",
                f"{against['flops_to_first_token']:.2f}" if against else "",
                f"{against['attained']:.2f}" if against else "",
            ],
            "generation": [
                spread(took["ttft_ms"]),
                ratio(against["ttft"]) if against else "",
                spread(took["decode_ms_per_token"]),
                spread(took["new_tokens_per_s"]),
            ],
            "work and memory": [
                f"{one['prompt_length']:,}",
                f"{one['flops']['to_first_token'] / 1e12:.4g}",
                number(one["kv_bytes"] / 1e6),
                number(one["memory"]["tensors"] / 1e6),
                memory(one["memory"]),
            ],
        }
        for name, row in cells.items():
            tables[name].append([one["name"], *row])
    return tables


def memory(found: Result) -> str:
    """Return the peak in MB: allocated / reserved on CUDA, resident (above what was there) on a CPU."""
    if "allocated" in found:
        return f"{number(found['allocated'] / 1e6)} / {number(found['reserved'] / 1e6)}"
    if "resident" in found:
        above = found["resident"] - found["resident_before"]
        return f"{number(found['resident'] / 1e6)} (+{number(above / 1e6)})"
    return "not known"


def phase_tables(setting: Result, quartiles: bool) -> Tables:
    """Return milliseconds and FLOPs of a setting with a row for each phase and a column for each variant.

    Args:
        setting: the setting.
        quartiles: whether to add them to the medians.
    """
    shown = [one for one in setting["variants"] if one["error"] is None]
    head = ["phase", *(one["name"] for one in shown)]
    times, flops = [head], [head]
    for name in PHASES:
        took = [one["phases_ms"][name] for one in shown]
        times.append([name, *(spread(one) if quartiles else number(one["median"]) for one in took)])
        flops.append([name, *(f"{one['flops']['phases'].get(name, 0) / 1e9:.4g}" for one in shown)])
    return {"phases, ms": times, "phases, GFLOP (decode: one step)": flops}


def title(setting: Result) -> str:
    """Return what a setting is."""
    return f"batch {setting['batch']}, {setting['height']} x {setting['width']} pixels"


def as_table(result: Result, console: Console) -> None:
    """Print all tables; quartiles of the phases are left to the files."""
    for line in headline(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for setting in result["settings"]:
        for name, rows in {**overview(setting), **phase_tables(setting, quartiles=False)}.items():
            table = Table(title=f"{title(setting)}: {name}", title_justify="left")
            for place, column in enumerate(rows[0]):
                table.add_column(column, justify="right" if place else "left")
            for row in rows[1:]:
                table.add_row(*map(escape, row))
            console.print(table)


def as_markdown(result: Result) -> str:
    """Return all tables as Markdown."""
    parts = ["\n".join(f"- {line}" for line in headline(result))]
    for setting in result["settings"]:
        parts.append(f"## {title(setting)}")
        for name, rows in {**overview(setting), **phase_tables(setting, quartiles=True)}.items():
            head, *body = ["| " + " | ".join(row) + " |" for row in rows]
            parts.append("\n".join([f"{name}:\n", head, "|" + "---|" * len(rows[0]), *body]))
    meanings = [f"- **{name}**: {MEANING[name]}" for name in PHASES]
    return "\n\n".join([*parts, "Phases:\n\n" + "\n".join(meanings)]) + "\n"


def phases_figure(result: Result) -> Figure:
    """Draw the phases of every setting: up to the first token stacked, and a decoding step beside."""
    settings: Sequence[Result] = [
        one for one in result["settings"] if any(row["error"] is None for row in one["variants"])
    ]
    heights = [1.1 + 0.3 * sum(row["error"] is None for row in one["variants"]) for one in settings]
    figure = Figure(figsize=(11.0, 1.2 + sum(heights)), dpi=150, layout="constrained")
    if not settings:
        return figure
    panels = figure.subplots(len(settings), 2, squeeze=False, width_ratios=[3, 1], height_ratios=heights)
    for (left, right), setting in zip(panels, settings, strict=True):
        _panel(left, right, setting)
    left, right = panels[-1]
    left.set_xlabel("ms up to the first token, medians; line: quartiles of the time to first token")
    right.set_xlabel("ms per decoding step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=7.5, frameon=False)
    return figure


def _panel(left: Axes, right: Axes, setting: Result) -> None:
    """Draw one setting."""
    rows = [one for one in setting["variants"] if one["error"] is None]
    names = [one["name"] for one in rows]
    start = [0.0] * len(rows)
    for phase in ("preprocess", *BEFORE):
        took = [one["phases_ms"][phase]["median"] for one in rows]
        left.barh(names, took, left=start, color=COLORS[phase], label=phase, height=0.7)
        start = [one + other for one, other in zip(start, took, strict=True)]
    for place, one in enumerate(rows):
        before = one["phases_ms"]["preprocess"]["median"]
        low, high = one["measures"]["ttft_ms"]["quartiles"]
        left.plot([before + low, before + high], [place, place], color=FULL, lw=1.2, marker="|", markersize=5)
    steps = [one["measures"]["decode_ms_per_token"] for one in rows]
    errors = [
        [one["median"] - one["quartiles"][0] for one in steps],
        [one["quartiles"][1] - one["median"] for one in steps],
    ]
    right.barh(names, [one["median"] for one in steps], xerr=errors, color=COLORS["decode"], height=0.7, ecolor=FULL)
    right.set_yticks([])
    left.set_title(title(setting), fontsize=10, loc="left")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.grid(axis="x", color="#EEEEEE", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8)


def write(result: Result, folder: Path) -> list[Path]:
    """Write JSON, Markdown and the figure, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("bench.json", "bench.md", "phases.png")]
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    files[1].write_text(as_markdown(result))
    phases_figure(result).savefig(files[2])
    return files
