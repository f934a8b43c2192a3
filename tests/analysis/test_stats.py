"""Statistics of run directories: reading, intervals, pairs and factors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from tests.helpers.records import board_records, failed, record, setting, write_setting
from tokenprune.experiments.analysis.differences import compare, correct_differences, correct_p_values, mcnemar
from tokenprune.experiments.analysis.factors import compare_factors, compare_levels
from tokenprune.experiments.analysis.intervals import bootstrap_interval
from tokenprune.experiments.analysis.pareto import pareto_front
from tokenprune.experiments.analysis.results import (
    Setting,
    find_full_setting,
    find_random_settings,
    read_records,
    read_results,
    scores_by_field,
    shorten_value,
)

# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_written_directory_is_read(tmp_path: Path) -> None:
    rows = [*board_records([[1, 0], [1, 1]]), failed(2, 0)]
    write_setting(tmp_path, rows, factors={"reducer.allocation": "UniformAllocation", "reducer.budget": 0.1})
    write_setting(tmp_path, rows, "Full", 1.0, "full")
    full, pruned = read_results(tmp_path).settings
    assert (full.role, full.method) == ("full", "full tokens")
    assert (pruned.strategy, pruned.budget, pruned.seed, pruned.n_errors) == ("HiRED", 0.1, 0, 1)
    assert pruned.method == "HiRED, allocation=UniformAllocation"
    assert (pruned.score.mean, pruned.score.n, pruned.score.groups) == (
        0.75,
        4,
        2,
    )  # no mean includes the failed sample
    assert (pruned.mean("kept"), pruned.median("encode_ms", "select_ms", "generate_ms")) == (40, 28.5)
    assert find_full_setting(pruned, [pruned, full]) is full


@pytest.mark.parametrize("tail", ['{"sample": "boards/9/0", "gro', "{", '{"sample": "x"}\x00'])
def test_a_truncated_last_line_is_omitted_with_a_note(tmp_path: Path, tail: str) -> None:
    write_setting(tmp_path, board_records([[1, 0], [1, 1]]), tail=tail)
    results = read_results(tmp_path)
    assert results.settings[0].is_truncated
    assert results.settings[0].score.n == 4
    assert "cut off" in results.notes[0]


def test_a_truncated_character_is_a_truncated_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(json.dumps(record(0, 0, 1)).encode() + b'\n{"sample": "\xc3')
    assert len(read_records(path)[0]) == 1
    assert read_records(path)[1]


def test_a_last_line_without_a_line_break_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record(0, 0, 1)))
    assert read_records(path) == ([record(0, 0, 1)], False)


def test_another_invalid_line_is_an_error_with_its_number(tmp_path: Path) -> None:
    folder = write_setting(tmp_path, [], tail='{"sample"\n' + json.dumps(record(0, 0, 1)) + "\n")
    with pytest.raises(ValueError, match=rf"{folder.name}.*records.jsonl, line 1: not a JSON object"):
        read_results(tmp_path)


def test_a_repeated_sample_is_an_error_with_its_lines(tmp_path: Path) -> None:
    rows = board_records([[1, 0]])
    folder = write_setting(tmp_path, [*rows, record(0, 1, 1)])
    with pytest.raises(ValueError, match=rf"{folder.name}.*line 3: sample 'boards/0/1' is already in line 2; delete"):
        read_results(tmp_path)


def test_part_files_are_read_and_may_repeat_equal_records(tmp_path: Path) -> None:
    rows = board_records([[1, 0], [1, 1]])
    folder = write_setting(tmp_path, rows[:2])
    for rank, part in enumerate((rows[1:3], rows[3:])):
        (folder / f"records.part-{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    assert read_results(tmp_path).settings[0].records == rows
    (folder / "records.part-2.jsonl").write_text(json.dumps(record(0, 0, 0)) + "\n")
    with pytest.raises(ValueError, match=r"part-2.jsonl: sample 'boards/0/0' is already in records.jsonl"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": 100.0}, "score from 0 to 1, got 100.0"),
        ({"score": None}, "score from 0 to 1"),
        ({"score": math.nan}, "score from 0 to 1"),
    ],
)
def test_a_wrong_score_is_an_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_setting(tmp_path, [record(0, 0, 1) | change, record(0, 1, 1)])
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path)


def test_a_record_without_its_group_is_an_error(tmp_path: Path) -> None:
    write_setting(tmp_path, [{"sample": "a", "score": 1}])
    with pytest.raises(ValueError, match="line 1: the record lacks group, correct"):
        read_results(tmp_path)


def test_a_wrong_directory_names_the_expected_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; expected a folder with settings/.*tokenprune ablate"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folder settings/"):
        read_results(tmp_path)
    folder = write_setting(tmp_path, [])
    with pytest.raises(ValueError, match="holds no record"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="two levels up"):
        read_results(folder)
    (folder / "setting.json").write_text("{}")
    with pytest.raises(ValueError, match=r"setting\.json: expected an object with name"):
        read_results(tmp_path)


def test_settings_without_records_are_noted(tmp_path: Path) -> None:
    write_setting(tmp_path, board_records([[1]]))
    write_setting(tmp_path, [], tail='{"sam')
    (tmp_path / "settings" / "half").mkdir()
    results = read_results(tmp_path)
    assert len(results.settings) == 1
    assert [word in note for word, note in zip(["cut off", "no record yet", "half"], results.notes, strict=True)] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("tokenprune.strategies.HiRED.release", "HiRED.release"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        (
            {"class_path": "a.b.Top", "init_args": {"layer": [-2, 1], "on": True, "off": None}},
            "Top(layer=[-2, 1], on=true, off=none)",
        ),
        ("/data/models/mini/checkpoint", "mini/checkpoint"),
        (0.1, "0.1"),
    ],
)
def test_shorten_value(value: Any, text: str) -> None:
    assert shorten_value(value) == text


def test_the_method_names_the_varied_factors() -> None:
    reducer = {"class_path": "a.HiRED", "init_args": {"positions": "preserve"}}
    seeded = {"reducer": reducer, "seed": 3, "reducer.selection.seed": 3}
    assert setting([], strategy="HiRED", factors=seeded).method == "HiRED(positions=preserve)"
    assert setting([], strategy="HiRED", factors={"reducer": "a.HiRED", "reducer.budget": 0.2}).method == "HiRED"
    varied = setting([], strategy="HiRED", factors={"reducer.selection.layer": -2, "model": "x", "dtype": "float16"})
    assert varied.method == "HiRED, selection.layer=-2, dtype=float16"


# --- intervals --------------------------------------------------------------------------------------------------------


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


# --- pairs ------------------------------------------------------------------------------------------------------------


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


# --- factors ----------------------------------------------------------------------------------------------------------


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
