"""Medians, quartiles and ratios of measurements that were taken in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

LEVEL = 0.95
"""Minimum probability with which an interval contains the true median."""


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity.

    Args:
        values: the measurements in the order of the rounds.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the measurements."""
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
    """The ratio baseline / value over rounds, with a confidence interval.

    Args:
        median: median of the ratios of all rounds.
        low: lower end of the interval of the median.
        high: upper end of the interval.
        coverage: probability that such an interval contains the true median, for any distribution.
    """

    median: float
    low: float
    high: float
    coverage: float

    @classmethod
    def of(cls, baseline: Sequence[float], values: Sequence[float]) -> Ratio:
        """Return the ratio baseline / value, paired by round: 2 means twice as fast.

        Args:
            baseline: measurements of the baseline.
            values: measurements of the same rounds.
        """
        ratios = sorted(reference / value for reference, value in zip(baseline, values, strict=True))
        rank, coverage = interval_rank(len(ratios))
        return cls(float(np.median(ratios)), ratios[rank], ratios[-1 - rank], coverage)

    def as_data(self) -> dict[str, Any]:
        """Return plain data."""
        return {"median": self.median, "interval": [self.low, self.high], "coverage": self.coverage}


def interval_rank(number: int, level: float = LEVEL) -> tuple[int, float]:
    """Return the rank, from both ends, of the measurements that bound the median, and the coverage of the interval.

    The probability that an interval between two order statistics contains the true median follows from the binomial
    distribution. With fewer than six measurements no interval reaches 95 %. The interval is then the full range, and
    the coverage states its actual probability.

    Args:
        number: number of measurements.
        level: required coverage.
    """
    coverages = [1 - 2 * float(binom.cdf(rank, number, 0.5)) for rank in range((number + 1) // 2)]
    sufficient = [rank for rank, coverage in enumerate(coverages) if coverage >= level]
    rank = sufficient[-1] if sufficient else 0
    return rank, max(0.0, coverages[rank])
