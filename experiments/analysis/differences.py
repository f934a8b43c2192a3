"""Paired differences of two settings, sample by sample, with corrected p-values.

``docs/explanation/statistics.md`` gives the reasons for the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy.stats import binomtest

from tokenprune.experiments.analysis.intervals import Interval, bootstrap_interval
from tokenprune.experiments.analysis.results import Setting


@dataclass(frozen=True)
class Difference:
    """First setting minus second setting on their common samples without an error.

    Args:
        score: mean difference of the scores.
        only_first: number of samples that only the first setting answers correctly.
        only_second: number of samples that only the second setting answers correctly.
        p: McNemar's exact p-value.
        unpaired: number of samples that only one of the two settings has without an error.
        holm: p-value after Holm's correction over a table; `None` without a correction.
    """

    score: Interval
    only_first: int
    only_second: int
    p: float
    unpaired: int
    holm: float | None = None

    @property
    def verdict(self) -> str:
        """The conclusion from the interval as a short phrase."""
        if not self.score.n:
            return "no sample in common"
        if not self.score.has_bounds:
            return "no interval: one group"
        if self.score.contains_zero:
            return "no difference seen"
        direction = "higher" if self.score.mean > 0 else "lower"
        return direction if self.holm is None or self.holm < 0.05 else f"{direction}, alone but not after Holm"


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        only_first: number of samples that only the first setting answers correctly.
        only_second: number of samples that only the second setting answers correctly.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def compare(first: Setting, second: Setting, seed: int = 0) -> Difference:
    """Return the first setting minus the second one on their common samples without an error.

    Args:
        first: the minuend.
        second: the subtrahend.
        seed: seed of the bootstrap.
    """
    common = [sample for sample in first.valid_records if sample in second.valid_records]
    pairs = [(first.valid_records[sample], second.valid_records[sample]) for sample in common]
    gaps = [float(a["score"]) - float(b["score"]) for a, b in pairs]
    only_first = sum(bool(a["correct"]) and not b["correct"] for a, b in pairs)
    only_second = sum(bool(b["correct"]) and not a["correct"] for a, b in pairs)
    return Difference(
        bootstrap_interval(gaps, [str(a["group"]) for a, _ in pairs], seed),
        only_first,
        only_second,
        mcnemar(only_first, only_second) if pairs else math.nan,
        len(first.valid_records) + len(second.valid_records) - 2 * len(common),
    )


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction for multiple comparisons.

    Args:
        p_values: p-values of one family; NaN entries stay NaN and are not counted.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected, least = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        corrected[index] = least
    return corrected


def correct_differences(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with p-values after Holm's correction over all of them.

    Args:
        differences: the comparisons of one table.
    """
    adjusted = correct_p_values([difference.p for difference in differences])
    return [replace(difference, holm=p) for difference, p in zip(differences, adjusted, strict=True)]
