"""Text of the numbers in tables."""

from __future__ import annotations

import math

from tokenprune.experiments.analysis.intervals import Interval
from tokenprune.experiments.analysis.results import Budget

SAME = "≈"
"""Marks an entry without a significant difference from the best entry of its column."""
DASH = "\N{EN DASH}"


def format_budget(budget: Budget) -> str:
    """Return a budget as text.

    Args:
        budget: a `float` is a ratio, an `int` a count, and a `str` a description; or `None`.
    """
    if budget is None or isinstance(budget, str):
        return budget or "no budget"
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:.6g}%"


def format_percent(value: float, sign: bool = False) -> str:
    """Return a fraction as percent with one decimal, never as minus zero.

    Args:
        value: the fraction.
        sign: whether to write a plus sign before positive values.
    """
    if math.isnan(value):
        return DASH
    return f"{round(100 * value, 1) + 0.0:{'+' if sign else ''}.1f}"


def format_interval(interval: Interval, sign: bool = False) -> str:
    """Return a mean and its interval in percent.

    Args:
        interval: the interval.
        sign: whether to write a plus sign before positive values.
    """
    if not interval.n:
        return DASH
    mean, low, high = (format_percent(value, sign) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]" if interval.has_bounds else f"{mean} (one group, no interval)"


def format_p_value(p: float | None) -> str:
    """Return a p-value as text.

    Args:
        p: the p-value.
    """
    if p is None or math.isnan(p):
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_number(value: float, decimals: int = 1) -> str:
    """Return a number with a fixed number of decimals.

    Args:
        value: the number.
        decimals: digits after the point.
    """
    return DASH if math.isnan(value) else f"{value:.{decimals}f}"
