"""Paired differences of two settings, and the corrected p-values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from tests.helpers.records import board_records, failed, record, setting
from tokenprune.experiments.analysis.differences import compare, correct_differences, correct_p_values, mcnemar
from tokenprune.experiments.analysis.results import (
    find_full_setting,
    find_random_settings,
)


@pytest.mark.parametrize(
    ("first", "second", "p"), [(0, 0, 1.0), (5, 0, 2 / 32), (1, 5, 2 * 7 / 64), (3, 3, 1.0), (1, 0, 1.0)]
)
def test_mcnemar_by_hand(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p)


def test_mcnemar_is_a_binomial_test_of_the_discordant_pairs() -> None:
    random = np.random.default_rng(3)
    for first, second in random.integers(0, 60, (20, 2)):
        if first + second:
            assert mcnemar(int(first), int(second)) == binomtest(first, first + second).pvalue


def test_a_comparison_by_hand() -> None:
    first = setting(board_records([[1, 1], [1, 0], [1, 1]]))
    second = setting([*board_records([[1, 0], [0, 0], [0, 1]]), record(9, 0, 1)])
    comparison = compare(first, second)
    assert (comparison.score.mean, comparison.score.n, comparison.unpaired) == (0.5, 6, 1)
    assert (comparison.only_first, comparison.only_second, comparison.p) == (3, 0, 0.25)
    assert (comparison.score.low, comparison.score.high, comparison.verdict) == (
        0.5,
        0.5,
        "higher",
    )  # 0.5 in every group
    reverse = compare(second, first)
    assert (reverse.score.mean, reverse.only_first, reverse.only_second, reverse.verdict) == (-0.5, 0, 3, "lower")


def test_an_interval_with_zero_means_no_difference_seen() -> None:
    first, second = setting(board_records([[1, 1], [0, 0], [1, 0]])), setting(board_records([[1, 0], [0, 1], [1, 0]]))
    assert compare(first, second).verdict == "no difference seen"
    assert compare(first, first).verdict == "no difference seen"


def test_comparisons_pair_by_sample_and_exclude_errors() -> None:
    rows = board_records([[1, 0], [1, 1]])
    shuffled = [*rows[::-1], failed(2, 0)]
    comparison = compare(setting(rows), setting(shuffled))
    assert (comparison.score.mean, comparison.score.n, comparison.unpaired, comparison.only_first) == (0, 4, 0, 0)
    assert compare(setting(rows), setting([record(7, 0, 1)])).verdict == "no sample in common"
    assert compare(setting(rows[:2]), setting(rows[:1])).verdict == "no interval: one group"


def test_pairing_narrows_the_interval() -> None:
    random = np.random.default_rng(5)
    hard = random.integers(0, 2, (40, 5))
    worse = hard * (random.random((40, 5)) > 0.1)
    first, second = setting(board_records(hard.tolist())), setting(board_records(worse.tolist()))
    paired = compare(first, second)
    assert paired.score.high - paired.score.low < first.score.high - first.score.low
    assert paired.verdict == "higher"


def test_holm_by_hand() -> None:
    assert correct_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = correct_p_values([0.02, math.nan, 0.9])
    assert corrected[::2] == [0.04, 0.9]
    assert math.isnan(corrected[1])
    assert correct_p_values([0.6, 0.7]) == [1, 1]
    pair = compare(setting(board_records([[1, 1, 1, 1, 1], [1]])), setting(board_records([[0, 0, 0, 0, 0], [1]])))
    assert [difference.holm for difference in correct_differences([pair, pair])] == [0.125, 0.125]


def test_compared_settings_share_model_task_and_budget() -> None:
    config = {"model": "a", "task": "t"}
    pruned = setting([], config=config)
    random = [
        setting([], strategy="Random", seed=seed, budget=budget, config=config)
        for seed in (1, 0)
        for budget in (0.1, 0.2)
    ]
    other_model = setting([], strategy="Random", seed=2, config={"model": "b", "task": "t"})
    full = [setting([], role="full", config={**config, "dtype": dtype}) for dtype in ("float32", "float16")]
    assert list(find_random_settings(pruned, [*random, other_model]).items()) == [(0, random[2]), (1, random[0])]
    assert find_full_setting(pruned, [other_model]) is None
    assert find_full_setting(setting([], config={**config, "dtype": "float16"}), full) is full[1]
