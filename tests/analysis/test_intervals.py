"""Bootstrap intervals over groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.helpers.records import board_records, failed, setting
from tokenprune.experiments.analysis.intervals import bootstrap_interval
from tokenprune.experiments.analysis.results import scores_by_field


def test_an_interval_resamples_groups() -> None:
    random = np.random.default_rng(0)
    boards = [random.integers(0, 2, random.integers(1, 20)).astype(float) for _ in range(30)]
    groups = [f"{number:03d}" for number, board in enumerate(boards) for _ in board]
    draws = np.random.default_rng(0).integers(0, 30, (2000, 30))
    means = [np.concatenate([boards[index] for index in draw]).mean() for draw in draws]
    interval = bootstrap_interval(np.concatenate(boards), groups)
    expected = (np.concatenate(boards).mean(), *np.quantile(means, [0.025, 0.975]))
    assert (interval.mean, interval.low, interval.high) == pytest.approx(expected)
    assert (interval.n, interval.groups) == (len(groups), 30)


def test_an_interval_of_two_groups_by_hand() -> None:
    # Draws are (a, a), (a, b), (b, a), (b, b): means 1, 0.25, 0.25, 0 in quarters; b counts three times as much.
    interval = bootstrap_interval([1, 0, 0, 0], ["a", "b", "b", "b"])
    assert (interval.mean, interval.low, interval.high) == (0.25, 0, 1)


def test_an_interval_does_not_depend_on_the_order_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    values, groups = random.random(60), [f"g{number}" for number in random.integers(0, 12, 60)]
    order = random.permutation(60)
    interval = bootstrap_interval(values, groups)
    permuted = bootstrap_interval(values[order], [groups[index] for index in order])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((permuted.mean, permuted.low, permuted.high))
    assert bootstrap_interval(values, groups) == interval
    assert bootstrap_interval(values, groups, seed=1) != interval
    monkeypatch.setattr("tokenprune.experiments.analysis.intervals.CHUNK", 50)  # changes the draws only
    chunked = bootstrap_interval(values, groups)
    assert (chunked.low, chunked.high) == pytest.approx((interval.low, interval.high), abs=0.03)


def test_one_group_and_no_sample_have_no_interval() -> None:
    one_group, no_sample = bootstrap_interval([1, 0], ["a", "a"]), bootstrap_interval([], [])
    assert (one_group.mean, one_group.has_bounds, one_group.contains_zero, one_group.groups) == (0.5, False, True, 1)
    assert (no_sample.n, no_sample.has_bounds) == (0, False)
    with pytest.raises(ValueError, match="2 values and 1 groups"):
        bootstrap_interval([1, 0], ["a"])


def compute_coverage(
    draw_samples: Callable[[np.random.Generator], tuple[np.ndarray[Any, Any], list[str]]], truth: float
) -> float:
    random = np.random.default_rng(7)
    intervals = [bootstrap_interval(*draw_samples(random), draws=500) for _ in range(300)]
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def test_intervals_over_groups_have_the_stated_coverage() -> None:
    """For correlated samples, 95 % intervals over groups cover the mean, and intervals over samples do not."""

    def draw_scores(random: np.random.Generator) -> np.ndarray[Any, Any]:
        share = random.beta(1.0, 1.0, 60)  # mean 0.5; one share for each of 60 groups of 8 samples
        return (random.random((60, 8)) < share[:, None]).astype(float).ravel()

    groups, singletons = [str(number // 8) for number in range(480)], [str(number) for number in range(480)]
    assert 0.91 <= compute_coverage(lambda random: (draw_scores(random), groups), 0.5) <= 0.98
    assert compute_coverage(lambda random: (draw_scores(random), singletons), 0.5) < 0.8


def test_scores_by_type() -> None:
    scores = scores_by_field(setting([*board_records([[1, 0], [1, 1]]), failed(2, 0)]), "type")
    assert {name: (score.mean, score.n) for name, score in scores.items()} == {"number": (1, 2), "side": (0.5, 2)}
