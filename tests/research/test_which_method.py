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
    assert {"HiRED", "DivPrune", "Random, seed 0", "EViT", "IPCV+HiRED"} <= names.keys()
    assert ("ToMe" in names) == (average >= 0.2)
    assert ("PyramidDrop" in names) == (average > 1 / 3)


def test_a_run_that_stopped_continues_with_the_next_image(tmp_path: Path) -> None:
    settings = {"0.1 HiRED": HiRED(0.1)}
    first = measure_world("boards", settings, 1, 0, "train", tmp_path / "results.json")
    both = measure_world("boards", settings, 2, 0, "train", tmp_path / "results.json")
    assert both.right["0.1 HiRED"][:1] == first.right["0.1 HiRED"]
    assert WorldResults.load(tmp_path / "results.json") == both
    assert len(both.questions) == 2
    with pytest.raises(ValueError, match="other settings"):
        measure_world("boards", {"0.1 Random": Random(0.1)}, 2, 0, "train", tmp_path / "results.json")


def test_results_of_other_settings_on_the_same_images_are_combined() -> None:
    questions = [[("shape", "base")]]
    first = WorldResults(questions, {FULL: [[1]], "0.1 A": [[0]]}, {}, {FULL: [9.0], "0.1 A": [1.0]})
    second = WorldResults(questions, {FULL: [[1]], "0.1 B": [[1]]}, {}, {FULL: [9.0], "0.1 B": [1.0]})
    assert list(first.combine(second).right) == [FULL, "0.1 A", "0.1 B"]
    other = WorldResults([[("count", "all")]], {FULL: [[0]], "0.1 A": [[1]]}, {}, {FULL: [9.0], "0.1 A": [2.0]})
    assert first.combine(other).tokens["0.1 A"] == [1.0, 2.0]
