"""Which levels of a factor win."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tokenprune.experiments.analysis.report.blocks import Block, Heading, Table, Text
from tokenprune.experiments.analysis.report.formatting import DASH, interval_text
from tokenprune.experiments.analysis.stats import Factor, Interval


def factor_blocks(found: Sequence[Factor]) -> list[Block]:
    """Return which levels of each factor win, and whether the intervals say so.

    Args:
        found: the factors of the grid.
    """
    if not found:
        return []
    text = (
        "Every level is averaged over the same values of all other factors and over the same samples. A level is "
        "behind the best one if the interval of the paired difference leaves out zero. The best level is chosen by "
        "looking, so its lead is a little too large; and the mean over other factors can hide that a level wins "
        "with one of them and loses with another."
    )
    blocks: list[Block] = [Heading("Which levels win"), Text([text])]
    for one in found:
        blocks.append(Heading(f"`{one.name}`", 3))
        if not one.levels:
            why = "No setting of the other factors was run at every level on common samples: nothing to compare."
            blocks.append(Text([why]))
            continue
        lines = []
        for level in one.levels:
            behind = DASH if level.behind is None else interval_text(replace_sign(level.behind), sign=True)
            lines.append([level.name, interval_text(level.score), behind, _standing(level.behind)])
        per_level = one.settings // len(one.levels)
        count = f"{per_level} experiment{'s' if per_level != 1 else ''} a level"
        left = f", {one.left_out} without a partner at every level left out" if one.left_out else ""
        blocks += [
            Table(["level", "mean score", "minus the best", "standing"], lines),
            Text([f"{verdict(one)} ({count}{left}.)"]),
        ]
    return blocks


def replace_sign(found: Interval) -> Interval:
    """Return an interval of the opposite difference.

    Args:
        found: the interval.
    """
    return replace(found, mean=-found.mean, low=-found.high, high=-found.low)


def _standing(behind: Interval | None) -> str:
    if behind is None:
        return "best"
    return "not separated from the best" if behind.holds_zero else "behind the best"


def verdict(found: Factor) -> str:
    """Return in a sentence which level wins, or that none does.

    Args:
        found: a factor with levels.
    """
    best = found.levels[0].name
    rivals = [level.name for level in found.levels[1:] if level.behind is not None and level.behind.holds_zero]
    if not rivals:
        return f"**{best} wins**: every other level is behind it."
    if len(rivals) == len(found.levels) - 1:
        return f"**No winner**: the intervals separate {best} from no other level."
    return f"**No single winner**: the intervals do not separate {best} from {' and '.join(rivals)}."
