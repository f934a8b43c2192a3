"""One color and one marker per method, the same in every figure and table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.colors import to_hex, to_rgb

from tokenprune.experiments.analysis.report.rows import full_rows, group_by_context, method_rows
from tokenprune.experiments.analysis.results import Setting, is_random_strategy

PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#332288",
    "#882255",
    "#999933",
    "#44AA99",
    "#AA4499",
    "#CC6677",
    "#117733",
)
"""Colors of Okabe and Ito, then of Tol's muted scheme; both are safe for color blindness."""
RANDOM_MARKERS = ("x", "+", "1", "2", "3", "4")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
FULL, RANDOM, INK = "#000000", "#7F7F7F", "#222222"


@dataclass(frozen=True)
class Style:
    """Color and marker of a method in all figures and tables.

    Args:
        color: color as `#RRGGBB`.
        marker: marker of matplotlib.
    """

    color: str
    marker: str


def rank_methods(settings: Sequence[Setting]) -> list[str]:
    """Return the methods without full and random tokens, by their mean lead over all settings of an equal budget.

    Args:
        settings: the settings.
    """
    scored = [setting for setting in settings if setting.score.n]
    means: dict[tuple[object, ...], list[float]] = {}
    for setting in scored:
        means.setdefault((setting.context, setting.budget), []).append(setting.score.mean)
    leads: dict[str, list[float]] = {}
    for setting in scored:
        if setting.role != "full" and not is_random_strategy(setting.strategy):
            lead = setting.score.mean - fmean(means[setting.context, setting.budget])
            leads.setdefault(setting.method, []).append(lead)
    return sorted(leads, key=lambda method: -fmean(leads[method]))


def assign_styles(settings: Iterable[Setting]) -> dict[str, Style]:
    """Return the color and marker of each method, the same in every figure and table.

    Args:
        settings: the settings.
    """
    settings = list(settings)
    methods = dict.fromkeys([*rank_methods(settings), *(setting.method for setting in settings)])
    random = sorted(method for method in methods if is_random_strategy(method))
    assigned = {method: Style(RANDOM, marker) for method, marker in zip(random, RANDOM_MARKERS, strict=False)}
    assigned["full tokens"] = Style(FULL, "*")
    for number, method in enumerate(name for name in methods if name not in assigned):
        # If there are more methods than colors, the hues repeat with a lower brightness.
        brightness = 0.55 ** (number // len(PALETTE))
        red, green, blue = (brightness * channel for channel in to_rgb(PALETTE[number % len(PALETTE)]))
        assigned[method] = Style(to_hex((red, green, blue)).upper(), MARKERS[number % len(MARKERS)])
    return {method: assigned[method] for method in methods}


def row_colors(settings: Sequence[Setting]) -> dict[str, str]:
    """Return the color of each row of all tables, by row name.

    Args:
        settings: the settings.
    """
    style_by_method = assign_styles(settings)
    by_context = group_by_context(settings)
    named = [
        (name, setting)
        for members in by_context.values()
        for name, by_budget in method_rows(members)
        for setting in by_budget.values()
    ]
    full = {name: FULL for members in by_context.values() for name, _ in full_rows(members)}
    return {**full, **{name: style_by_method[setting.method].color for name, setting in named}}
