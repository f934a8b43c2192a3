"""Medians, quartiles, and ratios of what was measured in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

LEVEL = 0.95
"""What an interval should cover."""


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing.

    Args:
        values: the measurements in the order of the rounds.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        low, high = np.percentile(self.values, [25, 75])
        return float(low), float(high)

    def as_data(self) -> dict[str, Any]:
        """Return plain data."""
        return {"median": self.median, "quartiles": list(self.quartiles), "values": list(self.values)}


@dataclass(frozen=True)
class Ratio:
    """How much smaller something is than in the same round of the baseline.

    Args:
        median: median of the ratios of all rounds.
        low: lower end of its interval.
        high: upper end.
        coverage: how often such an interval holds the true median, whatever the distribution.
    """

    median: float
    low: float
    high: float
    coverage: float

    @classmethod
    def of(cls, baseline: Sequence[float], values: Sequence[float]) -> Ratio:
        """Return baseline / value over rounds: 2 means twice as fast.

        Args:
            baseline: measurements of the baseline.
            values: measurements of the same rounds.
        """
        ratios = sorted(one / other for one, other in zip(baseline, values, strict=True))
        rank, coverage = interval_rank(len(ratios))
        return cls(float(np.median(ratios)), ratios[rank], ratios[-1 - rank], coverage)

    def as_data(self) -> dict[str, Any]:
        """Return plain data."""
        return {"median": self.median, "interval": [self.low, self.high], "coverage": self.coverage}


def interval_rank(number: int, level: float = LEVEL) -> tuple[int, float]:
    """Return which measurements bound the median: the ones at this rank from both ends, and what they cover.

    The interval between two measurements holds the true median with a probability that follows from counting alone.
    Below six measurements no interval reaches 95 %: then it is the whole range, and the coverage says what that is
    worth.

    Args:
        number: how many measurements there are.
        level: what should be covered.
    """
    covers = [1 - 2 * float(binom.cdf(rank, number, 0.5)) for rank in range((number + 1) // 2)]
    reached = [rank for rank, coverage in enumerate(covers) if coverage >= level]
    rank = reached[-1] if reached else 0
    return rank, max(0.0, covers[rank])
