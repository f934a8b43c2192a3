"""Report section on the best level of each factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tokenprune.display import format_count
from tokenprune.experiments.analysis.factors import Factor
from tokenprune.experiments.analysis.intervals import FEW_GROUPS, Interval
from tokenprune.experiments.analysis.report.blocks import Block, Heading, Image, Table, Text
from tokenprune.experiments.analysis.report.formatting import DASH, format_interval


def factor_blocks(factors: Sequence[Factor]) -> list[Block]:
    """Return the tables of the levels of each factor, with the levels that the intervals separate from the best one.

    Args:
        factors: the factors of the grid.
    """
    if not factors:
        return []
    text = (
        "Every level is averaged over the same values of all other factors and over the same samples. A level is "
        "behind the best one if the interval of the paired difference excludes zero. The best level is selected on "
        "these samples, so its lead is slightly too large. The mean over other factors can hide that a level wins "
        "with one value of a factor and loses with another."
    )
    blocks: list[Block] = [Heading("Which levels win"), Text([text])]
    if any(factor.levels for factor in factors):
        caption = (
            "Each level minus the best level of its factor, with the paired 95 % interval, and its mean score. Levels "
            "behind the best are gray."
        )
        blocks.append(Image("figures/effects.png", caption))
    for factor in factors:
        blocks.append(Heading(f"`{factor.name}`", 3))
        if not factor.levels:
            note = "No combination of the other factors was run at every level on common samples: nothing to compare."
            blocks.append(Text([note]))
            continue
        lines = []
        for level in factor.levels:
            difference = DASH if level.deficit is None else format_interval(negate(level.deficit), sign=True)
            lines.append([level.name, format_interval(level.score), difference, _format_standing(level.deficit)])
        per_level = factor.n_settings // len(factor.levels)
        count = f"{format_count(per_level, 'setting')} per level"
        unmatched = f", {factor.n_unmatched} without a match at every level omitted" if factor.n_unmatched else ""
        blocks += [
            Table(["level", "mean score", "minus the best", "standing"], lines),
            Text([f"{format_verdict(factor)} ({count}{unmatched}.)"]),
        ]
    return blocks


def negate(interval: Interval) -> Interval:
    """Return the interval of the difference with the opposite sign.

    Args:
        interval: the interval.
    """
    return replace(interval, mean=-interval.mean, low=-interval.high, high=-interval.low)


def _format_standing(deficit: Interval | None) -> str:
    if deficit is None:
        return "best"
    return "not separated from the best" if deficit.contains_zero else "behind the best"


def format_verdict(factor: Factor) -> str:
    """Return a sentence that names the best level and the levels that the intervals do not separate from it.

    Args:
        factor: a factor with levels.
    """
    best = factor.levels[0].name
    rivals = [level.name for level in factor.levels[1:] if level.deficit is not None and level.deficit.contains_zero]
    if not rivals and factor.levels[0].score.groups < FEW_GROUPS:
        return (
            f"{best} is ahead: every other level is behind it, but with fewer than {FEW_GROUPS} groups the intervals "
            "are too narrow to name a winner."
        )
    if not rivals:
        return f"**{best} wins**: every other level is behind it."
    if len(rivals) == len(factor.levels) - 1:
        return f"**No winner**: the intervals separate {best} from no other level."
    return f"**No single winner**: the intervals do not separate {best} from {' and '.join(rivals)}."
