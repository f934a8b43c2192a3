"""Means with 95 % intervals from a bootstrap over groups.

Samples about one image are not independent. Every interval therefore comes from a bootstrap over groups; a group holds
the samples of one image. ``docs/explanation/statistics.md`` gives the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.float64]
DRAWS = 2000
"""Bootstrap samples of an interval."""
FEW_GROUPS = 20
"""Number of groups below which intervals are too narrow."""
CHUNK = 2_000_000
"""Random numbers drawn per step of the bootstrap; limits the memory for many groups."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Args:
        mean: mean over samples; NaN without samples.
        low: lower end; NaN with fewer than two groups, because one group has no spread.
        high: upper end; NaN with fewer than two groups.
        n: number of samples.
        groups: number of groups of these samples.
    """

    mean: float
    low: float
    high: float
    n: int
    groups: int

    @property
    def has_bounds(self) -> bool:
        """Whether the interval has ends, which requires at least two groups."""
        return not math.isnan(self.low)

    @property
    def contains_zero(self) -> bool:
        """Whether zero lies in the interval; also true if the interval has no ends."""
        return not self.has_bounds or self.low <= 0 <= self.high


def bootstrap_interval(
    values: Values | Sequence[float], groups: Sequence[str], seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Return the mean over samples and its 95 % interval from a bootstrap over groups.

    Args:
        values: one number per sample, `[samples]`.
        groups: group of each sample, `[samples]`.
        seed: seed of the bootstrap.
        draws: number of bootstrap samples.

    Raises:
        ValueError: if `values` and `groups` differ in length.
    """
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} values and {len(groups)} groups; expected one group for each value")
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    # Groups are sorted, so that the result does not depend on the order of the samples.
    index = {group: number for number, group in enumerate(sorted(set(groups)))}
    group_ids = np.array([index[group] for group in groups])
    sums = np.bincount(group_ids, weights=np.asarray(values, dtype=float))
    sizes = np.bincount(group_ids).astype(float)
    mean = float(sums.sum() / sizes.sum())
    if len(sums) < 2:
        return Interval(mean, math.nan, math.nan, len(values), len(sums))
    random, step = np.random.default_rng(seed), max(1, CHUNK // len(sums))
    means = []
    for first in range(0, draws, step):
        resampled = random.integers(0, len(sums), (min(step, draws - first), len(sums)))  # [draws, groups]
        means.append(sums[resampled].sum(axis=1) / sizes[resampled].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(mean, float(low), float(high), len(values), len(sums))
