"""Figures of a report: score against tokens, FLOPs and time, one panel per method, and the effects of factors."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tokenprune.experiments.analysis.factors import Factor
from tokenprune.experiments.analysis.intervals import Interval
from tokenprune.experiments.analysis.pareto import pareto_front
from tokenprune.experiments.analysis.report.effects import negate
from tokenprune.experiments.analysis.report.formatting import format_percent
from tokenprune.experiments.analysis.report.rows import format_context, format_metric, group_by_context
from tokenprune.experiments.analysis.report.style import FULL, INK, Style, assign_styles, rank_methods
from tokenprune.experiments.analysis.results import Setting, is_random_strategy

MAX_COLORED = 8
"""Number of methods that have a color and a label if there are more of them; the others are gray."""
MAX_PANELS = 40
"""Number of methods that have a panel."""
GRAY, FRONT = "#C4C4C4", "#F2E2A8"
FONT_SIZE = 8.0
LABEL_WIDTH = 35
"""Characters in a line of the name of a method."""


@dataclass(frozen=True)
class Series:
    """The scores of a method at several costs.

    Args:
        method: name of the method.
        role: ``"full"``, ``"grid"`` or ``"baseline"``.
        costs: cost of each point, ascending.
        scores: score of each point in percent; the mean over seeds.
        lows: lower end of each score: of its interval or, with several seeds, of the scores of the seeds.
        highs: upper end of each score.
        n_seeds: number of seeds.
    """

    method: str
    role: str
    costs: Sequence[float]
    scores: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]
    n_seeds: int

    @property
    def label(self) -> str:
        """The name with the number of seeds, in at most four lines."""
        name = f"{self.method} ({self.n_seeds} seeds)" if self.n_seeds > 1 else self.method
        lines = textwrap.wrap(name, LABEL_WIDTH)
        return "\n".join(lines if len(lines) <= 4 else [*lines[:3], f"{lines[3][: LABEL_WIDTH - 3]}..."])


def draw_figures(settings: Sequence[Setting], factors: Sequence[Factor] = ()) -> dict[str, Figure]:
    """Return the figures by file name without extension.

    Args:
        settings: the settings.
        factors: the factors of the grid.
    """
    tokens = {setting.hash: setting.average_tokens for setting in settings}
    flops = {setting.hash: 100 * setting.flops_share for setting in settings}
    times = {setting.hash: setting.time_alone for setting in settings}
    tokens_label = "visual tokens, mean over LLM layers and samples"
    figures = {"accuracy_vs_tokens": draw_scatter(settings, tokens, tokens_label)}
    if has_flops(settings):
        figures["accuracy_vs_flops"] = draw_scatter(settings, flops, "FLOPs of LLM prefill, % of all tokens")
    figures["accuracy_vs_time"] = draw_scatter(settings, times, "encode + select + generate, ms per sample, median")
    if len(rank_methods(settings)) > MAX_COLORED:
        figures["accuracy_by_method"] = draw_methods(settings, tokens, "visual tokens")
    if any(factor.levels for factor in factors):
        figures["effects"] = draw_effects(factors)
    return figures


def has_flops(settings: Sequence[Setting]) -> bool:
    """Return whether records have the FLOPs of prefill, which older versions did not store.

    Args:
        settings: the settings.
    """
    return any(not math.isnan(setting.flops_share) for setting in settings)


def list_series(settings: Sequence[Setting], cost: Mapping[str, float]) -> list[Series]:
    """Return the series of each method: full tokens first, then the best method.

    Args:
        settings: the settings of one context.
        cost: cost of each setting, by hash.
    """
    by_method: dict[str, dict[object, list[Setting]]] = {}
    for setting in settings:
        if setting.score.n and not math.isnan(cost[setting.hash]):
            by_method.setdefault(setting.method, {}).setdefault(setting.budget, []).append(setting)
    order = {method: number for number, method in enumerate(rank_methods(settings))}
    methods = sorted(by_method, key=lambda method: order.get(method, -1))
    return [_build_series(list(by_method[method].values()), cost) for method in methods]


def _build_series(groups: Sequence[Sequence[Setting]], cost: Mapping[str, float]) -> Series:
    """Return the series of a method from its settings, grouped by budget."""
    points = []
    for group in groups:
        means = [100 * setting.score.mean for setting in group]
        # With skewed scores the mean can lie slightly outside the bootstrap interval, but lengths must not be negative.
        ends = means if len(group) > 1 else [*means, *_list_ends(group[0].score)]
        points.append((fmean(cost[setting.hash] for setting in group), fmean(means), min(ends), max(ends)))
    costs, scores, lows, highs = zip(*sorted(points), strict=True)
    first = groups[0][0]
    return Series(first.method, first.role, costs, scores, lows, highs, max(map(len, groups)))


def _list_ends(score: Interval) -> list[float]:
    return [100 * score.low, 100 * score.high] if score.has_bounds else []


def draw_scatter(settings: Sequence[Setting], cost: Mapping[str, float], label: str) -> Figure:
    """Draw score against a cost with labeled methods and the Pareto front, with one row for each model and task.

    With more than `MAX_COLORED` methods, the best have colors and labels and the others are gray. A second panel then
    shows the complete range of scores.

    Args:
        settings: the settings.
        cost: cost of each setting, by hash.
        label: label of the cost axis.
    """
    style_by_method, by_context = assign_styles(settings), group_by_context(settings)
    rows = [list_series(members, cost) for members in by_context.values()]
    has_overview = len(rank_methods(settings)) > MAX_COLORED
    lines = max((sum(1 + series.label.count("\n") for series in _list_colored(row)) for row in rows), default=0)
    height = max(4.2, 1.0 + 0.155 * lines)
    figure = Figure(figsize=(11.0, min(height * len(rows), 60.0)), dpi=150)
    panels = figure.subplots(
        len(rows), 1 + has_overview, squeeze=False, width_ratios=[1.0, 1.9] if has_overview else [1.0]
    )
    bottom, top = 0.62 / height / len(rows), 1 - 0.35 / height / len(rows)
    figure.subplots_adjust(left=0.06, right=0.75, bottom=bottom, top=top, wspace=0.14, hspace=0.3)
    for axes_of_row, row, members in zip(panels, rows, by_context.values(), strict=True):
        colored = _list_colored(row)
        for axes, width in zip(axes_of_row, (34, 80) if has_overview else (80,), strict=True):
            _draw_lines(axes, row, colored, style_by_method, has_front=True)
            axes.set_xlabel(textwrap.fill(label, width), color=INK, fontsize=9)
        axes_of_row[0].set_ylabel(f"{format_metric(members[0])}, %", color=INK)
        if len(by_context) > 1:
            axes_of_row[0].set_title(textwrap.shorten(format_context(members[0]), 80), fontsize=10, loc="left")
        if has_overview and colored:
            _zoom(axes_of_row[1], row, colored)
        _place_labels(axes_of_row[-1], colored, style_by_method, figure.get_figheight())
    return figure


def _list_colored(row: Sequence[Series]) -> list[Series]:
    """Return the series with a color and a label: full tokens, random tokens, and the best methods."""
    always = [series for series in row if series.role == "full" or is_random_strategy(series.method)]
    methods = [series for series in row if series not in always]
    return [*always, *methods[:MAX_COLORED]]


def _draw_lines(
    axes: Axes,
    row: Sequence[Series],
    colored: Sequence[Series],
    style_by_method: Mapping[str, Style],
    has_front: bool = False,
) -> None:
    """Draw all series of a panel, with a band for several seeds; colored points of equal cost are moved apart.

    Args:
        axes: the panel.
        row: all series.
        colored: the series with colors and intervals.
        style_by_method: color and marker by method.
        has_front: whether to draw the Pareto front.
    """
    costs = [cost for series in row for cost in series.costs]
    is_logarithmic = bool(costs) and min(costs) > 0 and max(costs) > 4 * min(costs)
    if is_logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    points = [(cost, score) for series in row for cost, score in zip(series.costs, series.scores, strict=True)]
    steps = [points[index] for index in pareto_front(points)]
    if steps and has_front:
        axes.step(*zip(*steps, strict=True), where="post", color=FRONT, lw=6, solid_capstyle="round", zorder=1)
    moved = [series.method for series in colored if series.role != "full"]
    for series in row:
        style = style_by_method[series.method]
        dashes = {"full": "", "baseline": "--"}.get(series.role, "-")
        if series not in colored:
            axes.plot(series.costs, series.scores, color=GRAY, ls=dashes, lw=0.9, marker=".", markersize=3, zorder=2)
            continue
        if series.role == "full":
            for score in series.scores:
                axes.axhline(score, color=FULL, lw=0.8, ls=":", zorder=1)
        shift = 1.0
        if is_logarithmic and series.method in moved and len(moved) > 1:  # at most 6 %, which suggests no other budget
            shift = 1.06 ** (2 * moved.index(series.method) / (len(moved) - 1) - 1)
        xs = [cost * shift for cost in series.costs]
        options: dict[str, Any] = {"color": style.color, "marker": style.marker, "ls": dashes, "lw": 1.4, "zorder": 4}
        if series.n_seeds > 1:
            axes.fill_between(xs, series.lows, series.highs, color=style.color, alpha=0.25, lw=0, zorder=2)
            axes.plot(xs, series.scores, markersize=4, **options)
            continue
        below = [score - low for score, low in zip(series.scores, series.lows, strict=True)]
        above = [high - score for score, high in zip(series.scores, series.highs, strict=True)]
        size = 9 if style.marker == "*" else 4.5
        axes.errorbar(xs, series.scores, [below, above], elinewidth=0.7, capsize=1.5, markersize=size, **options)
    _simplify(axes)


def _simplify(axes: Axes) -> None:
    axes.grid(color="#EEEEEE", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=FONT_SIZE)


def _zoom(axes: Axes, row: Sequence[Series], colored: Sequence[Series]) -> None:
    """Limit a panel to the scores of the best methods, and name the methods that are completely below."""
    best = [series for series in colored if not is_random_strategy(series.method)]
    low, high = min(min(series.lows) for series in best), max(max(series.highs) for series in best)
    margin = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    hidden = [series.method for series in row if max(series.scores) < low - margin]
    if hidden:
        text = textwrap.fill(f"below: {', '.join(hidden)}", 60)
        axes.text(0.99, 0.01, text, transform=axes.transAxes, fontsize=7, color="#666666", ha="right", va="bottom")


def _place_labels(
    axes: Axes, colored: Sequence[Series], style_by_method: Mapping[str, Style], figure_height: float
) -> None:
    """Write the name of each series at the right of a panel, next to its last point, without overlap.

    Args:
        axes: the panel.
        colored: the series.
        style_by_method: color and marker by method.
        figure_height: height of the figure in inches.
    """
    low, high = axes.get_ylim()
    visible = [series for series in colored if series.scores[-1] >= low]
    height = axes.get_position().height * figure_height * 72  # points
    line = 1.25 * FONT_SIZE / height * (high - low)
    ordered = sorted(visible, key=lambda series: series.scores[-1])
    sizes = [line * (1 + series.label.count("\n")) for series in ordered]
    places = spread_labels([series.scores[-1] for series in ordered], sizes, low, high)
    for series, place in zip(ordered, places, strict=True):
        axes.annotate(
            series.label,
            (series.costs[-1], series.scores[-1]),
            xytext=(1.03, place),
            textcoords=axes.get_yaxis_transform(),
            color=style_by_method[series.method].color,
            fontsize=FONT_SIZE,
            va="center",
            annotation_clip=False,
            linespacing=1.0,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0, 0.5),
                "color": style_by_method[series.method].color,
                "lw": 0.5,
                "alpha": 0.6,
            },
        )


def spread_labels(places: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Return the centers of labels that do not overlap, close to their wanted centers.

    Args:
        places: wanted centers, ascending.
        sizes: size of each label.
        low: smallest end of a label; ignored if the labels need more room.
        high: largest end of a label.
    """
    centers = list(places)
    for number, size in enumerate(sizes):
        least = low + size / 2 if not number else centers[number - 1] + (sizes[number - 1] + size) / 2
        centers[number] = max(centers[number], least)
    for number in reversed(range(len(sizes))):
        is_last = number + 1 == len(sizes)
        most = high if is_last else centers[number + 1] - sizes[number + 1] / 2
        centers[number] = min(centers[number], most - sizes[number] / 2)
    return centers


def draw_methods(settings: Sequence[Setting], cost: Mapping[str, float], label: str) -> Figure:
    """Draw one panel for each method, with the other methods in gray, for each model and task.

    Args:
        settings: the settings.
        cost: cost of each setting, by hash.
        label: label of the cost axis.
    """
    style_by_method, by_context = assign_styles(settings), group_by_context(settings)
    rows = [list_series(members, cost) for members in by_context.values()]
    shown = [[series for series in row if series.role != "full"][:MAX_PANELS] for row in rows]
    n_cols = 6
    heights = [0.5 + 1.35 * math.ceil(len(panels) / n_cols) for panels in shown]
    figure = Figure(figsize=(11.0, sum(heights)), dpi=150, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, row, panels, members in zip(parts, rows, shown, by_context.values(), strict=True):
        grid = part.subplots(max(1, math.ceil(len(panels) / n_cols)), n_cols, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, series in zip(grid.flat, panels, strict=False):
            _draw_lines(axes, [series, *(other for other in row if other is not series)], [series], style_by_method)
            axes.set_title("\n".join(textwrap.wrap(series.label, 30)[:3]), fontsize=7, pad=3, color=INK)
            axes.tick_params(labelsize=6)
        part.supxlabel(label, fontsize=FONT_SIZE)
        part.supylabel(f"{format_metric(members[0])}, %", fontsize=FONT_SIZE)
        if len(rows) > 1:
            part.suptitle(textwrap.shorten(format_context(members[0]), 80), fontsize=10)
    return figure


def draw_effects(factors: Sequence[Factor]) -> Figure:
    """Draw the main effects: each level minus the best level of its factor, with the paired 95 % interval.

    Args:
        factors: the factors of the grid; factors without levels are not drawn.
    """
    drawn = [factor for factor in factors if factor.levels]
    heights = [0.55 + 0.24 * len(factor.levels) for factor in drawn]
    figure = Figure(figsize=(9.0, 0.4 + sum(heights)), dpi=150, layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, factor in zip(panels, drawn, strict=True):
        for number, level in enumerate(factor.levels):
            deficit = None if level.deficit is None else negate(level.deficit)
            is_behind = deficit is not None and not deficit.contains_zero
            color = GRAY if is_behind else "#0072B2"
            if deficit is None:
                axes.plot(0, number, color=color, marker="D", markersize=5)
                continue
            mean, low, high = (100 * value for value in (deficit.mean, deficit.low, deficit.high))
            ends = [[max(0.0, mean - low)], [max(0.0, high - mean)]] if deficit.has_bounds else None
            axes.errorbar(mean, number, xerr=ends, color=color, marker="o", markersize=5, capsize=2, lw=1.2)
        names = [f"{textwrap.shorten(level.name, 60)}  {format_percent(level.score.mean)} %" for level in factor.levels]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.axvline(0, color=INK, lw=0.8, ls=":")
        axes.set_title(factor.name.removeprefix("reducer."), fontsize=9, loc="left", color=INK)
        _simplify(axes)
    panels[-1].set_xlabel("minus the best level, points; paired 95 % intervals", fontsize=FONT_SIZE)
    return figure
