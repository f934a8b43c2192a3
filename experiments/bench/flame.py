"""Profiles calls and draws flame graphs of phases, modules and operators, with widths proportional to their time.

A graph is built from the events of a Chrome trace of torch's profiler. Calls with equal names and equal callers share a
bar: for example, the 23 layers of a tower are one bar.
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
from tokenprune.experiments.bench.bench_model import BenchModel, random_image
from tokenprune.experiments.bench.measure import Variant, Workload, generate_once
from tokenprune.experiments.bench.phase_timer import FIRST_TOKEN_PHASES, PhaseTimer
from tokenprune.experiments.bench.report import COLORS

Event = Mapping[str, Any]
"""An event of a Chrome trace; times in microseconds."""

EVENT_PATTERNS = {
    "user_annotation": re.compile(r"phase: (.+)"),
    "python_function": re.compile(r"nn\.Module: (.+)_\d+"),
    "cpu_op": re.compile(r"aten::(.+)"),
}
"""Patterns of the drawn events by category; the group is the name in the graph."""
DEFAULT_PHASE = "generate"
"""The phase of events outside all explicit phases, as in `PhaseTimer`."""


@dataclass
class Bar:
    """One bar of the graph with its children.

    Args:
        name: phase, module or operator.
        milliseconds: time in milliseconds, including the children.
        children: bars of the called modules and operators by name.
    """

    name: str
    milliseconds: float = 0.0
    children: dict[str, Bar] = field(default_factory=dict)


def profile_variants(
    bench_model: BenchModel, workload: Workload, variants: Sequence[Variant], folder: Path, heading: str
) -> list[Path]:
    """Profile one call of each variant up to its first decoding step, and return the written files.

    `*.json` is a Chrome trace (chrome://tracing, Perfetto) with the phases as ranges. `*.txt` lists the operators with
    the longest own time. On a CPU, `*.png` draws all variants as flame graphs. On other devices there is no figure,
    because the operators only show the time on the host.

    Args:
        bench_model: the model.
        workload: its inputs.
        variants: the ways to run the model.
        folder: folder of the files; created if it does not exist.
        heading: title of the figure: the model and the machine.
    """
    inputs = bench_model.prepare([random_image(workload.size, seed) for seed in range(workload.batch)])
    device = bench_model.model.device.type
    cuda = [ProfilerActivity.CUDA] if device == "cuda" else []
    folder.mkdir(parents=True, exist_ok=True)
    files, graphs = [], {}
    for variant in variants:
        generate_once(bench_model, inputs, variant, 2)
        file = folder / f"{_to_file_name(f'{workload}-{variant.name}')}.json"
        with profile(activities=[ProfilerActivity.CPU, *cuda], with_stack=True) as profiler:
            generate_once(bench_model, inputs, variant, 2, create_timer=lambda: PhaseTimer(perf_counter))
        profiler.export_chrome_trace(str(file))
        if device == "cpu":
            graphs[variant.name] = build_flame_graph(json.loads(file.read_text())["traceEvents"])
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        listing = file.with_suffix(".txt")
        listing.write_text(profiler.key_averages().table(sort_by=order, row_limit=40) + "\n")
        files += [file, listing]
    if graphs:
        files.append(folder / f"{_to_file_name(str(workload))}.png")
        draw_flame_graphs(graphs, f"{heading}\n{workload}").savefig(files[-1])
    return files


def _to_file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def build_flame_graph(events: Iterable[Event]) -> Bar:
    """Return the flame graph of a call up to the end of prefill: a root bar whose children are the phases.

    As in `PhaseTimer`, time belongs to the innermost phase: a phase inside another phase becomes its sibling. Of nested
    operators only the outermost is included.

    Args:
        events: the events of a Chrome trace of one call, recorded with Python frames (`with_stack`).
    """
    root, drawn_events = Bar(""), sorted(_select_events(events), key=lambda event: (event[0], -event[1]))
    prefill_end = max((end for _, end, _, name in drawn_events if name == "prefill"), default=float("inf"))
    open_events: list[tuple[float, tuple[str, ...], bool]] = [(float("inf"), (DEFAULT_PHASE,), False)]
    for start, end, category, name in drawn_events:
        if start >= prefill_end:
            break
        while open_events[-1][0] <= start:
            open_events.pop()
        _, caller_path, is_inside_operator = open_events[-1]
        if is_inside_operator:
            continue
        if category == "cpu_op" and name == caller_path[-1].lower():  # a module that only wraps this operator
            open_events.append((end, caller_path, True))
            continue
        path = (name,) if category == "user_annotation" else (*caller_path, name)
        if len(open_events) > 1:
            _add_time(root, caller_path, start - end)  # subtract the time of this event from its caller
        _add_time(root, path, end - start)
        open_events.append((end, path, category == "cpu_op"))
    root.milliseconds = sum(bar.milliseconds for bar in root.children.values())
    return root


def _select_events(events: Iterable[Event]) -> Iterator[tuple[float, float, str, str]]:
    """Yield start, end, category and name of the events that the graph includes."""
    for event in events:
        pattern = EVENT_PATTERNS.get(str(event.get("cat")))
        match = pattern.fullmatch(event["name"]) if pattern else None
        if match:
            start = float(event["ts"])
            yield start, start + float(event["dur"]), event["cat"], match[1]


def _add_time(bar: Bar, path: Sequence[str], microseconds: float) -> None:
    """Add time to the bar at a path and to its ancestors; create missing bars."""
    for name in path:
        bar = bar.children.setdefault(name, Bar(name))
        bar.milliseconds += microseconds / 1e3


def draw_flame_graphs(graphs: Mapping[str, Bar], heading: str) -> Figure:
    """Draw flame graphs in rows with a common time axis; wide bars show their names and shares.

    Args:
        graphs: the graphs by name of the variant.
        heading: title of the figure.
    """
    depths = [_count_levels(graph) - 1 for graph in graphs.values()]
    height = 0.9 + sum(0.75 + 0.24 * depth for depth in depths)
    figure = Figure(figsize=(14.0, height), dpi=150, layout="constrained")
    figure.suptitle(heading, fontsize=9, color=INK)
    height_ratios = [depth + 2 for depth in depths]
    panels = figure.subplots(len(graphs), 1, squeeze=False, sharex=True, height_ratios=height_ratios)[:, 0]
    longest = max(graph.milliseconds for graph in graphs.values())
    for axes, (name, graph), levels in zip(panels, graphs.items(), depths, strict=True):
        start = 0.0
        for phase in FIRST_TOKEN_PHASES:
            if phase in graph.children:
                _draw_bar(axes, graph.children[phase], COLORS[phase], start, 0, longest, graph.milliseconds)
                start += graph.children[phase].milliseconds
        axes.set_title(f"{name}: {graph.milliseconds:,.0f} ms", fontsize=9, loc="left", color=INK)
        axes.set(xlim=(0, longest), ylim=(levels, 0), yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8)
    panels[-1].set_xlabel("ms until the end of prefill, under the profiler", fontsize=8, color=INK)
    return figure


def _draw_bar(axes: Axes, bar: Bar, color: str, start: float, level: int, longest: float, total: float) -> None:
    """Draw a bar and its children; skip bars that would be thin lines."""
    if bar.milliseconds < 0.001 * longest:
        return
    paleness = 0.12 * level  # deeper levels are paler
    fill = [channel + (1 - channel) * min(paleness, 0.6) for channel in to_rgb(color)]
    axes.barh(level + 0.5, bar.milliseconds, left=start, height=0.96, color=[fill], edgecolor="white", linewidth=0.4)
    label = f"{bar.name} {bar.milliseconds / total:.0%}"
    max_letters = int(190 * bar.milliseconds / longest)
    if max_letters > 5:
        text = label if len(label) <= max_letters else f"{label[: max_letters - 1]}…"
        center = start + bar.milliseconds / 2
        axes.text(center, level + 0.5, text, ha="center", va="center", fontsize=6.5, color="#1A1A1A")
    for child in sorted(bar.children.values(), key=lambda child: -child.milliseconds):
        _draw_bar(axes, child, color, start, level + 1, longest, total)
        start += child.milliseconds


def _count_levels(bar: Bar) -> int:
    """Return the number of levels of a bar, including its own."""
    return 1 + max((_count_levels(child) for child in bar.children.values()), default=0)
