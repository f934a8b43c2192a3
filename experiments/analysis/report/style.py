"""One color and one marker per method, the same in every figure and table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.colors import to_hex, to_rgb

from tokenprune.experiments.analysis.report.rows import contexts, full_rows, rows
from tokenprune.experiments.analysis.stats import Setting

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
"""Colors of Okabe and Ito, then of Tol's muted scheme, made for every kind of color vision."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
FULL, RANDOM, INK = "#000000", "#7F7F7F", "#222222"


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure and table.

    Args:
        color: its color.
        marker: its marker.
    """

    color: str
    marker: str


def styles(settings: Iterable[Setting]) -> dict[str, Style]:
    """Return one color and marker per method, the same in every figure and table.

    Args:
        settings: the experiments.
    """
    methods = dict.fromkeys(setting.method for setting in settings)
    found = {"full tokens": Style(FULL, "*"), "Random": Style(RANDOM, "x")}
    for number, method in enumerate(name for name in methods if name not in found):
        # More methods than colors: the same hues, darker.
        darker = 0.55 ** (number // len(PALETTE))
        red, green, blue = (darker * part for part in to_rgb(PALETTE[number % len(PALETTE)]))
        found[method] = Style(to_hex((red, green, blue)).upper(), MARKERS[number % len(MARKERS)])
    return {method: found[method] for method in methods}


def row_colors(settings: Sequence[Setting]) -> dict[str, str]:
    """Return the color of every row of every table.

    Args:
        settings: the experiments.
    """
    looks = styles(settings)
    named = [
        (name, setting)
        for part in contexts(settings).values()
        for name, entries in rows(part)
        for setting in entries.values()
    ]
    full = {name: FULL for part in contexts(settings).values() for name, _ in full_rows(part)}
    return {**full, **{name: looks[setting.method].color for name, setting in named}}
