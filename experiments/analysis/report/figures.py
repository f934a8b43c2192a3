"""The figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tokenprune.experiments.analysis.report.rows import context_text, contexts, metric_text, rows
from tokenprune.experiments.analysis.report.style import FULL, INK, Style, styles
from tokenprune.experiments.analysis.stats import Setting, pareto


def figures(settings: Sequence[Setting]) -> dict[str, Figure]:
    """Return the figures by name.

    Args:
        settings: the experiments.
    """
    time = ("encode_ms", "select_ms", "generate_ms")
    kept = {setting.hash: setting.mean("kept") for setting in settings}
    took = {setting.hash: setting.median(*time) for setting in settings}
    return {
        "accuracy_vs_tokens": scatter(settings, kept, "visual tokens kept, mean over samples", spread=True),
        "accuracy_vs_time": scatter(settings, took, "encode + select + generate, ms per sample, median", spread=False),
    }


def scatter(settings: Sequence[Setting], cost: Mapping[str, float], label: str, spread: bool) -> Figure:
    """Draw score against a cost with intervals and the Pareto front, a panel for each model and task.

    Args:
        settings: the experiments.
        cost: cost of each experiment by hash.
        label: what the cost is.
        spread: whether to move points of different methods apart sideways.
    """
    looks, parts = styles(settings), contexts(settings)
    drawn = [c for c in settings if c.score.n and not math.isnan(cost[c.hash])]
    legend = _legend(drawn, looks)
    lines = sum(1 + str(handle.get_label()).count("\n") for handle in legend)
    tall = max(4.6 * len(parts), 0.5 + 0.175 * lines)
    figure = Figure(figsize=(10.0, min(tall, 40.0)), dpi=150, layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(parts), 1, squeeze=False)[:, 0])
    for axes, part in zip(panels, parts.values(), strict=True):
        shown = [setting for setting in part if setting in drawn]
        _panel(axes, shown, cost, looks, spread)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{metric_text(part[0])}, %")
        if len(parts) > 1:
            axes.set_title(textwrap.shorten(context_text(part[0]), 80), fontsize=10)
    if legend:
        figure.legend(handles=legend, loc="outside right upper", fontsize=7.5, frameon=False)
    return figure


def _legend(settings: Sequence[Setting], looks: Mapping[str, Style]) -> list[Line2D]:
    seeds: dict[str, set[int]] = {}
    for setting in settings:
        seeds.setdefault(setting.method, set()).add(setting.seed)
    roles, handles = {setting.method: setting.role for setting in settings}, []
    for method, found in seeds.items():
        name = f"{method} (seeds {', '.join(map(str, sorted(found)))})" if len(found) > 1 else method
        name = "\n".join(textwrap.wrap(name, 42))
        line = {"full": "", "baseline": "--"}.get(roles[method], "-")
        look = looks[method]
        handles.append(Line2D([], [], color=look.color, marker=look.marker, ls=line, lw=1, label=name, markersize=6))
    return [*handles, Line2D([], [], color="#BBBBBB", lw=4, label="Pareto front")] if handles else []


def _panel(
    axes: Axes, settings: Sequence[Setting], cost: Mapping[str, float], looks: Mapping[str, Style], spread: bool
) -> None:
    """Draw the experiments of one model and task."""
    known = [cost[setting.hash] for setting in settings]
    logarithmic = bool(known) and min(known) > 0 and max(known) > 4 * min(known)
    series = [(entries, setting.method) for _, entries in rows(settings) for setting in list(entries.values())[:1]]
    where = {setting.hash: cost[setting.hash] for setting in settings}
    if spread and logarithmic:
        # By a tenth at most: enough to see the markers, too little to be taken for another budget.
        for number, (entries, _) in enumerate(series):
            for setting in entries.values():
                where[setting.hash] *= 1.1 ** (2 * number / max(1, len(series) - 1) - 1)
    front = pareto([(cost[setting.hash], setting.score.mean) for setting in settings])
    steps = [(where[settings[place].hash], 100 * settings[place].score.mean) for place in front]
    if steps:
        axes.step(*zip(*steps, strict=True), where="post", color="#BBBBBB", lw=4, solid_capstyle="round", zorder=1)
    for entries, method in series:
        _points(axes, sorted(entries.values(), key=lambda setting: cost[setting.hash]), where, looks[method])
    for setting in settings:
        if setting.role == "full":
            axes.axhline(100 * setting.score.mean, color=FULL, lw=0.8, ls=":", zorder=1)
            _points(axes, [setting], where, looks[setting.method])
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#EEEEEE", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _points(axes: Axes, settings: Sequence[Setting], where: Mapping[str, float], style: Style) -> None:
    """Draw a series of points with intervals."""
    means = [100 * setting.score.mean for setting in settings]
    # The mean of skewed scores can lie outside a bootstrap's interval by a hair, and lengths must not be negative.
    below = [max(0.0, 100 * (c.score.mean - c.score.low)) if c.score.known else 0.0 for c in settings]
    above = [max(0.0, 100 * (c.score.high - c.score.mean)) if c.score.known else 0.0 for c in settings]
    size = 9 if style.marker == "*" else 5
    axes.errorbar(
        [where[setting.hash] for setting in settings],
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
