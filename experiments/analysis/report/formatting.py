"""Numbers as the tables write them."""

from __future__ import annotations

import math

from tokenprune.experiments.analysis.stats import Budget, Interval

SAME = "≈"
"""Marks what cannot be told from the best of its column."""
DASH = "\N{EN DASH}"


def budget_text(budget: Budget) -> str:
    """Return a budget as text.

    Args:
        budget: a ratio, a count as an `int`, words, or `None`.
    """
    if budget is None or isinstance(budget, str):
        return budget or "no budget"
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:.6g}%"


def number_text(value: float, sign: bool = False) -> str:
    """Return a share as percent with one decimal, never as minus zero.

    Args:
        value: the share.
        sign: whether to write a plus.
    """
    if math.isnan(value):
        return DASH
    return f"{round(100 * value, 1) + 0.0:{'+' if sign else ''}.1f}"


def interval_text(found: Interval, sign: bool = False) -> str:
    """Return a mean and its interval in percent.

    Args:
        found: the interval.
        sign: whether to write a plus.
    """
    if not found.n:
        return DASH
    if not found.known:
        return f"{number_text(found.mean, sign)} (one group, no interval)"
    return f"{number_text(found.mean, sign)} [{number_text(found.low, sign)}, {number_text(found.high, sign)}]"


def p_text(p: float | None) -> str:
    """Return a p-value as text.

    Args:
        p: the p-value.
    """
    if p is None or math.isnan(p):
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def plain(value: float, decimals: int = 1) -> str:
    """Return a number with so many decimals.

    Args:
        value: the number.
        decimals: digits after the point.
    """
    return DASH if math.isnan(value) else f"{value:.{decimals}f}"
