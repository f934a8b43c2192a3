"""Figures of a report: score against tokens, against FLOPs and against time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tokenprune.experiments.analysis.pareto import pareto_front
from tokenprune.experiments.analysis.report.rows import format_context, format_metric, group_by_context, method_rows
from tokenprune.experiments.analysis.report.style import FULL, INK, Style, assign_styles
from tokenprune.experiments.analysis.results import Setting


def draw_figures(settings: Sequence[Setting]) -> dict[str, Figure]:
    """Return the figures by file name without extension.

    Args:
        settings: the settings.
    """
    phases = ("encode_ms", "select_ms", "generate_ms")
    tokens = {setting.hash: setting.average_tokens for setting in settings}
    flops = {setting.hash: 100 * setting.flops_share for setting in settings}
    times = {setting.hash: setting.median(*phases) for setting in settings}
    figures = {
        "accuracy_vs_tokens": draw_scatter(
            settings, tokens, "visual tokens, mean over LLM layers and samples", spread=True
        ),
        "accuracy_vs_flops": draw_scatter(settings, flops, "FLOPs of LLM prefill, % of all tokens", spread=True),
        "accuracy_vs_time": draw_scatter(
            settings, times, "encode + select + generate, ms per sample, median", spread=False
        ),
    }
    return figures if has_flops(settings) else {name: figures[name] for name in figures if name != "accuracy_vs_flops"}


def has_flops(settings: Sequence[Setting]) -> bool:
    """Return whether records have the FLOPs of prefill, which older versions did not store.

    Args:
        settings: the settings.
    """
    return any(not math.isnan(setting.flops_share) for setting in settings)


def draw_scatter(settings: Sequence[Setting], cost: Mapping[str, float], label: str, spread: bool) -> Figure:
    """Draw score against a cost with intervals and the Pareto front, with one panel for each model and task.

    Args:
        settings: the settings.
        cost: cost of each setting, by hash.
        label: label of the cost axis.
        spread: whether to move points of different methods apart horizontally.
    """
    style_by_method, by_context = assign_styles(settings), group_by_context(settings)
    drawable = [setting for setting in settings if setting.score.n and not math.isnan(cost[setting.hash])]
    legend = _legend_handles(drawable, style_by_method)
    n_lines = sum(1 + str(handle.get_label()).count("\n") for handle in legend)
    height = max(4.6 * len(by_context), 0.5 + 0.175 * n_lines)
    figure = Figure(figsize=(10.0, min(height, 40.0)), dpi=150, layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(by_context), 1, squeeze=False)[:, 0])
    for axes, members in zip(panels, by_context.values(), strict=True):
        _draw_panel(axes, [setting for setting in members if setting in drawable], cost, style_by_method, spread)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{format_metric(members[0])}, %")
        if len(by_context) > 1:
            axes.set_title(textwrap.shorten(format_context(members[0]), 80), fontsize=10)
    if legend:
        figure.legend(handles=legend, loc="outside right upper", fontsize=7.5, frameon=False)
    return figure


def _legend_handles(settings: Sequence[Setting], style_by_method: Mapping[str, Style]) -> list[Line2D]:
    seeds_by_method: dict[str, set[int]] = {}
    for setting in settings:
        seeds_by_method.setdefault(setting.method, set()).add(setting.seed)
    roles, handles = {setting.method: setting.role for setting in settings}, []
    for method, seeds in seeds_by_method.items():
        name = f"{method} (seeds {', '.join(map(str, sorted(seeds)))})" if len(seeds) > 1 else method
        name = "\n".join(textwrap.wrap(name, 42))
        line = {"full": "", "baseline": "--"}.get(roles[method], "-")
        style = style_by_method[method]
        handles.append(Line2D([], [], color=style.color, marker=style.marker, ls=line, lw=1, label=name, markersize=6))
    return [*handles, Line2D([], [], color="#BBBBBB", lw=4, label="Pareto front")] if handles else []


def _draw_panel(
    axes: Axes,
    settings: Sequence[Setting],
    cost: Mapping[str, float],
    style_by_method: Mapping[str, Style],
    spread: bool,
) -> None:
    """Draw the settings of one model and task."""
    costs = [cost[setting.hash] for setting in settings]
    is_logarithmic = bool(costs) and min(costs) > 0 and max(costs) > 4 * min(costs)
    series = [
        (by_budget, setting.method)
        for _, by_budget in method_rows(settings)
        for setting in list(by_budget.values())[:1]
    ]
    xs = {setting.hash: cost[setting.hash] for setting in settings}
    if spread and is_logarithmic:
        # At most 10 %: enough to separate the markers, and too little to suggest another budget.
        for number, (by_budget, _) in enumerate(series):
            for setting in by_budget.values():
                xs[setting.hash] *= 1.1 ** (2 * number / max(1, len(series) - 1) - 1)
    front = pareto_front([(cost[setting.hash], setting.score.mean) for setting in settings])
    steps = [(xs[settings[index].hash], 100 * settings[index].score.mean) for index in front]
    if steps:
        axes.step(*zip(*steps, strict=True), where="post", color="#BBBBBB", lw=4, solid_capstyle="round", zorder=1)
    for by_budget, method in series:
        ordered = sorted(by_budget.values(), key=lambda setting: cost[setting.hash])
        _draw_points(axes, ordered, xs, style_by_method[method])
    for setting in settings:
        if setting.role == "full":
            axes.axhline(100 * setting.score.mean, color=FULL, lw=0.8, ls=":", zorder=1)
            _draw_points(axes, [setting], xs, style_by_method[setting.method])
    if is_logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#EEEEEE", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _draw_points(axes: Axes, settings: Sequence[Setting], xs: Mapping[str, float], style: Style) -> None:
    """Draw a series of points with intervals."""
    means = [100 * setting.score.mean for setting in settings]
    # With skewed scores the mean can lie slightly outside the bootstrap interval, but lengths must not be negative.
    scores = [setting.score for setting in settings]
    below = [max(0.0, 100 * (score.mean - score.low)) if score.has_bounds else 0.0 for score in scores]
    above = [max(0.0, 100 * (score.high - score.mean)) if score.has_bounds else 0.0 for score in scores]
    size = 9 if style.marker == "*" else 5
    axes.errorbar(
        [xs[setting.hash] for setting in settings],
        means,
        yerr=[below, above],
        color=style.color,
        marker=style.marker,
        markersize=size,
        ls="--" if settings[0].role == "baseline" else "-",
        lw=0.9,
        elinewidth=1,
        capsize=2,
        zorder=3,
    )
