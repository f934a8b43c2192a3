"""Effects of factors, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tests.helpers.records import board_records, setting
from tokenprune.experiments.analysis.factors import compare_factors, compare_levels
from tokenprune.experiments.analysis.pareto import pareto_front
from tokenprune.experiments.analysis.results import Setting


def make_grid_setting(boards: Sequence[Sequence[float]], **values: Any) -> Setting:
    return setting(board_records(boards), factors=values)


def test_factor_levels_by_hand() -> None:
    grid = [
        make_grid_setting([[1, 1], [1, 0]], a="x", b=1),  # mean 0.75
        make_grid_setting([[1, 0], [1, 0]], a="x", b=2),  # mean 0.5
        make_grid_setting([[0, 1], [0, 0]], a="y", b=1),  # mean 0.25
        make_grid_setting([[0, 0], [0, 0]], a="y", b=2),  # mean 0
    ]
    a, b = compare_factors(grid)
    assert [(level.name, level.score.mean) for level in a.levels] == [("x", 0.625), ("y", 0.125)]
    assert a.levels[1].deficit is not None
    assert (a.levels[1].deficit.mean, a.levels[1].deficit.low, a.levels[1].deficit.high) == (0.5, 0.5, 0.5)
    assert (a.is_separated, a.n_settings, a.n_unmatched) == (True, 4, 0)
    assert [(level.name, level.score.mean) for level in b.levels] == [("1", 0.5), ("2", 0.25)]
    assert not b.is_separated  # 0.5 in the first board, 0 in the second


def test_an_incomplete_grid_compares_only_matched_settings() -> None:
    easy, hard = [[1, 1], [1, 1]], [[0, 0], [0, 1]]
    grid = [
        make_grid_setting(easy, a="x", b=1),
        make_grid_setting(hard, a="x", b=2),
        make_grid_setting(easy, a="y", b=1),
    ]
    effect = compare_levels(grid, "a")
    assert [level.score.mean for level in effect.levels] == [1, 1]  # not 0.625 against 1
    assert (effect.n_settings, effect.n_unmatched, effect.is_separated) == (2, 1, False)
    partial = compare_levels([make_grid_setting([[0, 1], [0, 1]], a="x"), make_grid_setting([[1], [1]], a="y")], "a")
    assert [(level.name, level.score.n) for level in partial.levels] == [("y", 2), ("x", 2)]  # samples in common
    assert compare_levels([grid[1], grid[2]], "a").levels == ()


def test_models_can_be_levels_and_baselines_cannot() -> None:
    settings = [
        setting(board_records([[1], [score]]), config={"model": model, "task": "t"}, factors={"model": model})
        for model, score in (("m", 0), ("n", 1))
    ]
    (effect,) = compare_factors([*settings, setting([], role="baseline", factors={"model": "o"})])
    assert [level.name for level in effect.levels] == ["n", "m"]


def test_the_pareto_front() -> None:
    assert pareto_front([(3, 0.9), (1, 0.5), (2, 0.4), (1, 0.6), (4, 0.9), (0.5, math.nan)]) == [3, 0]
    assert pareto_front([(10, 0.5), (20, 0.5), (20, 0.7), (5, 0.1), (30, 0.6), (20, 0.7)]) == [
        3,
        0,
        2,
        5,
    ]  # equal points stay
    assert pareto_front([]) == []
