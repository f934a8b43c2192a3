"""The study that compares all strategies on boards and pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.which_method import (
    AVERAGES,
    FULL,
    choose_settings,
    format_report,
    list_settings,
    list_two_stages,
    measure_world,
)
from research.world_results import WorldResults
from tokenprune.strategies import HiRED, Random

SETTINGS = {"0.1 HiRED": HiRED(0.1), "0.1 Random": Random(0.1)}


@pytest.mark.parametrize("world", ["boards", pytest.param("pages", marks=pytest.mark.slow)])
def test_parts_and_a_resumed_run_equal_one_run(world: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    first = measure_world(world, SETTINGS, 1, 0, "train", file)
    both = measure_world(world, SETTINGS, 2, 0, "train", file)  # measures the second image only
    assert WorldResults.load(file) == both
    second = measure_world(world, SETTINGS, 1, 1, "train")
    assert first.combine(second) == both
    assert both.images == [f"{world} train 0", f"{world} train 1"]
    assert all(len(image) == len(row) for image, row in zip(both.questions, both.right[FULL], strict=True))
    assert min(map(min, both.coverage[FULL])) == 1.0
    assert max(both.tokens["0.1 HiRED"]) < min(both.tokens[FULL])
    assert "| HiRED minus | 10% |" in format_report(both)
    assert "minus" not in format_report(both, "DivPrune")
    for other in (
        lambda: measure_world(world, {"0.1 Random": Random(0.1)}, 2, 0, "train", file),
        lambda: measure_world(world, SETTINGS, 2, 1, "train", file),
        lambda: measure_world(world, SETTINGS, 1, 0, "train", file),
    ):
        with pytest.raises(ValueError, match="other settings or images"):
            other()
    assert WorldResults.load(file) == both


def build_results(image: str, *settings: str) -> WorldResults:
    """Return the results of settings for one image with one question."""
    names = (FULL, *settings)
    return WorldResults([image], [[("shape", "base")]], {n: [[1]] for n in names}, {}, {n: [9.0] for n in names})


def test_results_of_other_settings_or_other_images_are_combined() -> None:
    combined = build_results("boards train 0", "0.1 A").combine(build_results("boards train 0", "0.1 B"))
    assert list(combined.right) == list(combined.tokens) == [FULL, "0.1 A", "0.1 B"]
    assert len(combined.images) == len(combined.questions) == 1
    combined = build_results("boards train 0", "0.1 A").combine(build_results("boards train 1", "0.1 A"))
    assert combined.right["0.1 A"] == [[1], [1]]
    assert combined.images == ["boards train 0", "boards train 1"]
    with pytest.raises(ValueError, match=r"other settings, such as '0\.1 B'"):
        build_results("boards train 0", "0.1 A").combine(build_results("boards train 1", "0.1 A", "0.1 B"))
    with pytest.raises(ValueError, match="1 of the images are in both results, such as boards train 1"):
        combined.combine(build_results("boards train 1", "0.1 A"))


@pytest.mark.parametrize("average", [0.1, 0.4])
def test_settings_contain_strategies_of_all_stages(average: float) -> None:
    names = list_settings(average)
    assert {"HiRED", "DivPrune", "Random, seed 0", "EViT", "IPCV+HiRED"} <= names.keys()
    assert ("ToMe" in names) == (average >= 0.2)
    assert ("PyramidDrop" in names) == (average > 1 / 3)


def test_methods_are_chosen_by_name() -> None:
    assert not any("QuestionFirst+" in name for name in choose_settings(AVERAGES))
    settings = choose_settings(AVERAGES, ["HiRED", "ToMe", "QuestionFirst+TransPrune"])
    assert {name.split(" ", 1)[1] for name in settings} == {"HiRED", "ToMe", "QuestionFirst+TransPrune"}
    assert "0.05 ToMe" not in settings
    with pytest.raises(ValueError, match=r"no strategy 'QuestionFrist'; the names are .*QuestionFirst"):
        choose_settings(AVERAGES, ["HiRED", "QuestionFrist"])


def test_two_stages_keep_the_average_tokens() -> None:
    settings = {name: value for name, value in list_two_stages(0.1).items() if name.startswith("HiRED")}
    results = measure_world("boards", {**settings, "0.1 HiRED": list_settings(0.1)["HiRED"]}, 1, 0, "train")
    expected = results.tokens["0.1 HiRED"][0]
    assert results.tokens["HiRED+TransPrune"][0] == pytest.approx(expected, rel=0.05)
