"""The study that compares all strategies on boards and pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.which_method import FULL, WorldResults, format_report, list_settings, measure_world
from tokenprune.strategies import HiRED, Random


@pytest.mark.parametrize("world", ["boards", pytest.param("pages", marks=pytest.mark.slow)])
def test_results_of_two_runs_equal_the_results_of_one(world: str, tmp_path: Path) -> None:
    settings = {"0.1 HiRED": HiRED(0.1), "0.1 Random": Random(0.1)}
    both = measure_world(world, settings, 2, 0, "train")
    parts = [measure_world(world, settings, 1, first, "train") for first in (0, 1)]
    merged = parts[0] + parts[1]
    assert merged == both
    both.save(tmp_path / "results.json")
    assert WorldResults.load(tmp_path / "results.json") == both
    assert all(len(image) == len(row) for image, row in zip(both.questions, both.right[FULL], strict=True))
    assert min(map(min, both.coverage[FULL])) == 1.0
    assert max(both.tokens["0.1 HiRED"]) < min(both.tokens[FULL])
    assert "| HiRED minus | 10% |" in format_report(both)


@pytest.mark.parametrize("average", [0.1, 0.4])
def test_settings_contain_strategies_of_all_stages(average: float) -> None:
    names = list_settings(average)
    assert {"HiRED", "DivPrune", "Random, seed 0"} <= names.keys()
    assert ("PyramidDrop" in names) == (average > 1 / 3)
