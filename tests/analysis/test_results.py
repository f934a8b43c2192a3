"""Reading of run directories, and the names of settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.records import board_records, failed, record, setting, write_setting
from tokenprune.experiments.analysis.results import (
    find_full_setting,
    read_records,
    read_results,
    shorten_value,
)


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
