"""One colour and one marker per method, the same in every figure and table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.colors import to_hex, to_rgb

from tokenprune.experiments.analysis.report.rows import full_rows, rows, settings
from tokenprune.experiments.analysis.stats import Cell

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
"""Colours of Okabe and Ito, then of Tol's muted scheme, made for every kind of colour vision."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
FULL, RANDOM, INK = "#000000", "#7F7F7F", "#222222"


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure and table.

    Args:
        colour: its colour.
        marker: its marker.
    """

    colour: str
    marker: str


def styles(cells: Iterable[Cell]) -> dict[str, Style]:
    """Return one colour and marker per method, the same in every figure and table.

    Args:
        cells: the experiments.
    """
    methods = dict.fromkeys(cell.method for cell in cells)
    found = {"full tokens": Style(FULL, "*"), "Random": Style(RANDOM, "x")}
    for number, method in enumerate(name for name in methods if name not in found):
        # More methods than colours: the same hues, darker.
        darker = 0.55 ** (number // len(PALETTE))
        red, green, blue = (darker * part for part in to_rgb(PALETTE[number % len(PALETTE)]))
        found[method] = Style(to_hex((red, green, blue)).upper(), MARKERS[number % len(MARKERS)])
    return {method: found[method] for method in methods}


def row_colours(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the colour of every row of every table.

    Args:
        cells: the experiments.
    """
    looks = styles(cells)
    named = [
        (name, cell) for part in settings(cells).values() for name, entries in rows(part) for cell in entries.values()
    ]
    full = {name: FULL for part in settings(cells).values() for name, _ in full_rows(part)}
    return {**full, **{name: looks[cell.method].colour for name, cell in named}}
