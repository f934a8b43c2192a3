"""The figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tokenprune.experiments.analysis.report.rows import metric_text, rows, setting_text, settings
from tokenprune.experiments.analysis.report.style import FULL, INK, Style, styles
from tokenprune.experiments.analysis.stats import Cell, pareto


def figures(cells: Sequence[Cell]) -> dict[str, Figure]:
    """Return the figures by name.

    Args:
        cells: the experiments.
    """
    time = ("encode_ms", "select_ms", "generate_ms")
    kept = {cell.hash: cell.mean("kept") for cell in cells}
    took = {cell.hash: cell.median(*time) for cell in cells}
    return {
        "accuracy_vs_tokens": scatter(cells, kept, "visual tokens kept, mean over samples", spread=True),
        "accuracy_vs_time": scatter(cells, took, "encode + select + generate, ms per sample, median", spread=False),
    }


def scatter(cells: Sequence[Cell], cost: Mapping[str, float], label: str, spread: bool) -> Figure:
    """Draw score against a cost with intervals and the Pareto front, a panel for each model and task.

    Args:
        cells: the experiments.
        cost: cost of each experiment by hash.
        label: what the cost is.
        spread: whether to move points of different methods apart sideways.
    """
    looks, parts = styles(cells), settings(cells)
    drawn = [c for c in cells if c.score.n and not math.isnan(cost[c.hash])]
    legend = _legend(drawn, looks)
    lines = sum(1 + str(handle.get_label()).count("\n") for handle in legend)
    tall = max(4.6 * len(parts), 0.5 + 0.175 * lines)
    figure = Figure(figsize=(10.0, min(tall, 40.0)), dpi=150, layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(parts), 1, squeeze=False)[:, 0])
    for axes, part in zip(panels, parts.values(), strict=True):
        shown = [cell for cell in part if cell in drawn]
        _panel(axes, shown, cost, looks, spread)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{metric_text(part[0])}, %")
        if len(parts) > 1:
            axes.set_title(textwrap.shorten(setting_text(part[0]), 80), fontsize=10)
    if legend:
        figure.legend(handles=legend, loc="outside right upper", fontsize=7.5, frameon=False)
    return figure


def _legend(cells: Sequence[Cell], looks: Mapping[str, Style]) -> list[Line2D]:
    seeds: dict[str, set[int]] = {}
    for cell in cells:
        seeds.setdefault(cell.method, set()).add(cell.seed)
    roles, handles = {cell.method: cell.role for cell in cells}, []
    for method, found in seeds.items():
        name = f"{method} (seeds {', '.join(map(str, sorted(found)))})" if len(found) > 1 else method
        name = "\n".join(textwrap.wrap(name, 42))
        line = {"full": "", "baseline": "--"}.get(roles[method], "-")
        look = looks[method]
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, ls=line, lw=1, label=name, markersize=6))
    return [*handles, Line2D([], [], color="#BBBBBB", lw=4, label="Pareto front")] if handles else []


def _panel(
    axes: Axes, cells: Sequence[Cell], cost: Mapping[str, float], looks: Mapping[str, Style], spread: bool
) -> None:
    """Draw the experiments of one model and task."""
    known = [cost[cell.hash] for cell in cells]
    logarithmic = bool(known) and min(known) > 0 and max(known) > 4 * min(known)
    series = [(entries, cell.method) for _, entries in rows(cells) for cell in list(entries.values())[:1]]
    where = {cell.hash: cost[cell.hash] for cell in cells}
    if spread and logarithmic:
        # By a tenth at most: enough to see the markers, too little to be taken for another budget.
        for number, (entries, _) in enumerate(series):
            for cell in entries.values():
                where[cell.hash] *= 1.1 ** (2 * number / max(1, len(series) - 1) - 1)
    front = pareto([(cost[cell.hash], cell.score.mean) for cell in cells])
    steps = [(where[cells[place].hash], 100 * cells[place].score.mean) for place in front]
    if steps:
        axes.step(*zip(*steps, strict=True), where="post", color="#BBBBBB", lw=4, solid_capstyle="round", zorder=1)
    for entries, method in series:
        _points(axes, sorted(entries.values(), key=lambda cell: cost[cell.hash]), where, looks[method])
    for cell in cells:
        if cell.role == "full":
            axes.axhline(100 * cell.score.mean, color=FULL, lw=0.8, ls=":", zorder=1)
            _points(axes, [cell], where, looks[cell.method])
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#EEEEEE", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _points(axes: Axes, cells: Sequence[Cell], where: Mapping[str, float], style: Style) -> None:
    """Draw a series of points with intervals."""
    means = [100 * cell.score.mean for cell in cells]
    # The mean of skewed scores can lie outside a bootstrap's interval by a hair, and lengths must not be negative.
    below = [max(0.0, 100 * (c.score.mean - c.score.low)) if c.score.known else 0.0 for c in cells]
    above = [max(0.0, 100 * (c.score.high - c.score.mean)) if c.score.known else 0.0 for c in cells]
    size = 9 if style.marker == "*" else 5
    axes.errorbar(
        [where[cell.hash] for cell in cells],
        means,
        yerr=[below, above],
        color=style.colour,
        marker=style.marker,
        markersize=size,
        ls="--" if cells[0].role == "baseline" else "-",
        lw=0.9,
        elinewidth=1,
        capsize=2,
        zorder=3,
    )
