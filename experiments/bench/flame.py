"""Profiles calls, and draws them as flame graphs: phases, modules and operators, as wide as the time that they take.

A graph is made from the events of a Chrome trace of torch's profiler. Same calls of the same callers are one bar, so
that the 23 layers of a tower are one bar of 23 layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from tokenprune.experiments.analysis.report.style import INK
from tokenprune.experiments.bench.bench_model import BenchModel, image
from tokenprune.experiments.bench.measure import Variant, Workload, call
from tokenprune.experiments.bench.phase_timer import BEFORE, PhaseTimer
from tokenprune.experiments.bench.report import COLORS

Event = Mapping[str, Any]
"""An event of a Chrome trace; times in microseconds."""

KINDS = {
    "user_annotation": re.compile(r"phase: (.+)"),
    "python_function": re.compile(r"nn\.Module: (.+)_\d+"),
    "cpu_op": re.compile(r"aten::(.+)"),
}
"""What is drawn, by the category of the event, and its name in the graph."""
OUTSIDE = "generate"
"""The phase of whatever no other one claims, as in the ledger."""


@dataclass
class Bar:
    """What ran in one place of the graph.

    Args:
        name: phase, module or operator.
        took: time in milliseconds, that of the bars below included.
        below: what it called.
    """

    name: str
    took: float = 0.0
    below: dict[str, Bar] = field(default_factory=dict)


def trace(
    subject: BenchModel, setting: Workload, variants: Sequence[Variant], folder: Path, heading: str
) -> list[Path]:
    """Profile one call of each variant to its first decoding step, and return the files.

    `*.json` is a Chrome trace (chrome://tracing, Perfetto) with the phases as ranges; `*.txt` lists the operators that
    took longest by themselves. On a CPU `*.png` draws all variants as flame graphs; elsewhere operators only say what
    they cost the host.

    Args:
        subject: the model.
        setting: its inputs.
        variants: the ways to run it.
        folder: where files go; made if it is not there.
        heading: what ran, and where, for the image.
    """
    inputs = subject.prepare([image(setting.size, seed) for seed in range(setting.batch)])
    device = subject.model.device.type
    cuda = [ProfilerActivity.CUDA] if device == "cuda" else []
    folder.mkdir(parents=True, exist_ok=True)
    files, graphs = [], {}
    for variant in variants:
        call(subject, inputs, variant, 2)
        file = folder / f"{_file_name(f'{setting}-{variant.name}')}.json"
        with profile(activities=[ProfilerActivity.CPU, *cuda], with_stack=True) as found:
            call(subject, inputs, variant, 2, ledger=lambda: PhaseTimer(perf_counter))
        found.export_chrome_trace(str(file))
        if device == "cpu":
            graphs[variant.name] = flame(json.loads(file.read_text())["traceEvents"])
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        listing = file.with_suffix(".txt")
        listing.write_text(found.key_averages().table(sort_by=order, row_limit=40) + "\n")
        files += [file, listing]
    if graphs:
        files.append(folder / f"{_file_name(str(setting))}.png")
        flame_figure(graphs, f"{heading}\n{setting}").savefig(files[-1])
    return files


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def flame(events: Iterable[Event]) -> Bar:
    """Return what ran until the end of prefill, phases below the root.

    As in the ledger, time belongs to the innermost phase: a phase inside another one stands beside it. Of operators
    only the outermost is shown.

    Args:
        events: the events of a Chrome trace of one call, made with Python frames (`with_stack`).
    """
    root, found = Bar(""), sorted(_named(events), key=lambda one: (one[0], -one[1]))
    prefilled = max((end for _, end, _, name in found if name == "prefill"), default=float("inf"))
    open_events: list[tuple[float, tuple[str, ...], bool]] = [(float("inf"), (OUTSIDE,), False)]
    for start, end, kind, name in found:
        if start >= prefilled:
            break
        while open_events[-1][0] <= start:
            open_events.pop()
        _, path, inside_operator = open_events[-1]
        if inside_operator:
            continue
        if kind == "cpu_op" and name == path[-1].lower():  # a module that is nothing but this operator
            open_events.append((end, path, True))
            continue
        own = (name,) if kind == "user_annotation" else (*path, name)
        if len(open_events) > 1:
            _add(root, path, start - end)  # the caller's own time is what is left of it
        _add(root, own, end - start)
        open_events.append((end, own, kind == "cpu_op"))
    root.took = sum(bar.took for bar in root.below.values())
    return root


def _named(events: Iterable[Event]) -> Iterator[tuple[float, float, str, str]]:
    """Yield start, end, category and name of the events that are drawn."""
    for event in events:
        pattern = KINDS.get(str(event.get("cat")))
        found = pattern.fullmatch(event["name"]) if pattern else None
        if found:
            start = float(event["ts"])
            yield start, start + float(event["dur"]), event["cat"], found[1]


def _add(bar: Bar, path: Sequence[str], microseconds: float) -> None:
    """Add time to a place and to everything above it."""
    for name in path:
        bar = bar.below.setdefault(name, Bar(name))
        bar.took += microseconds / 1e3


def flame_figure(graphs: Mapping[str, Bar], heading: str) -> Figure:
    """Draw flame graphs below each other on one scale of time; the widest parts carry their names and shares.

    Args:
        graphs: the graphs by what was called.
        heading: what ran, and where.
    """
    deep = [_depth(graph) - 1 for graph in graphs.values()]
    figure = Figure(figsize=(14.0, 0.9 + sum(0.75 + 0.24 * one for one in deep)), dpi=150, layout="constrained")
    figure.suptitle(heading, fontsize=9, color=INK)
    panels = figure.subplots(len(graphs), 1, squeeze=False, sharex=True, height_ratios=[one + 2 for one in deep])[:, 0]
    longest = max(graph.took for graph in graphs.values())
    for axes, (name, graph), levels in zip(panels, graphs.items(), deep, strict=True):
        start = 0.0
        for phase in BEFORE:
            if phase in graph.below:
                _draw(axes, graph.below[phase], COLORS[phase], start, 0, longest, graph.took)
                start += graph.below[phase].took
        axes.set_title(f"{name}: {graph.took:,.0f} ms", fontsize=9, loc="left", color=INK)
        axes.set(xlim=(0, longest), ylim=(levels, 0), yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8)
    panels[-1].set_xlabel("ms until the end of prefill, under the profiler", fontsize=8, color=INK)
    return figure


def _draw(axes: Axes, bar: Bar, color: str, start: float, level: int, longest: float, whole: float) -> None:
    """Draw a bar and what is below it; what would be a thin line is left white."""
    if bar.took < 0.001 * longest:
        return
    paler = 0.12 * level  # the deeper, the paler
    fill = [channel + (1 - channel) * min(paler, 0.6) for channel in to_rgb(color)]
    axes.barh(level + 0.5, bar.took, left=start, height=0.96, color=[fill], edgecolor="white", linewidth=0.4)
    label = f"{bar.name} {bar.took / whole:.0%}"
    room = int(190 * bar.took / longest)  # letters that fit
    if room > 5:
        text = label if len(label) <= room else f"{label[: room - 1]}…"
        axes.text(start + bar.took / 2, level + 0.5, text, ha="center", va="center", fontsize=6.5, color="#1A1A1A")
    for below in sorted(bar.below.values(), key=lambda one: -one.took):
        _draw(axes, below, color, start, level + 1, longest, whole)
        start += below.took


def _depth(bar: Bar) -> int:
    """Return the number of levels, this one included."""
    return 1 + max((_depth(below) for below in bar.below.values()), default=0)
