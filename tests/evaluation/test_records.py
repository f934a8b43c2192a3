"""Record files: truncated lines, locks, and merging of parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenprune.experiments.evaluation.records import (
    InUseError,
    RecordFile,
    list_recorded_samples,
    merge_if_complete,
    merge_records,
    read_lines,
)


def test_a_truncated_record_is_dropped_and_written_again(tmp_path: Path) -> None:
    with RecordFile(tmp_path) as file:
        file.add({"sample": "a", "score": 1.0})
        file.add({"sample": "b", "score": 0.0})
    content = (tmp_path / "records.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text(content + '{"sample": "c", "sco')
    assert list_recorded_samples(tmp_path) == {"a", "b"}
    with RecordFile(tmp_path) as file:
        file.add({"sample": "c", "score": 1.0})
        with pytest.raises(ValueError, match="'c' has a record already"):
            file.add({"sample": "c", "score": 1.0})
    assert [row["sample"] for row in read_lines(tmp_path / "records.jsonl")] == ["a", "b", "c"]
    (tmp_path / "records.jsonl").write_text("{broken\n" + content)
    with pytest.raises(ValueError, match=r"records.jsonl, line 1 is no record"):
        list_recorded_samples(tmp_path)


def test_two_processes_cannot_write_the_same_records(tmp_path: Path) -> None:
    with RecordFile(tmp_path), pytest.raises(InUseError, match="another process writes to"):
        RecordFile(tmp_path)
    with RecordFile(tmp_path, 0), RecordFile(tmp_path, 1):  # separate part files
        for rank in (None, 1):
            with pytest.raises(InUseError):
                RecordFile(tmp_path, rank)
    with RecordFile(tmp_path), pytest.raises(InUseError):
        RecordFile(tmp_path, 0)


def test_parts_are_not_merged_while_a_process_writes_or_samples_are_missing(tmp_path: Path) -> None:
    with RecordFile(tmp_path, 0) as first_part:
        first_part.add({"sample": "a"})
        merge_if_complete(tmp_path, ["a"])
    merge_if_complete(tmp_path, ["a", "b"])
    assert (tmp_path / "records.part-0.jsonl").is_file()
    with RecordFile(tmp_path, 1) as second_part:
        second_part.add({"sample": "b"})
    merge_if_complete(tmp_path, ["a", "b"])
    assert [row["sample"] for row in read_lines(tmp_path / "records.jsonl")] == ["a", "b"]
    assert not list(tmp_path.glob("records.part*"))


def test_parts_are_merged_in_sample_order(tmp_path: Path) -> None:
    for rank, names in enumerate((["c", "a"], ["b"])):
        with RecordFile(tmp_path, rank) as file:
            for name in names:
                file.add({"sample": name})
    assert list_recorded_samples(tmp_path) == {"a", "b", "c"}
    merge_records(tmp_path, ["a", "b", "c"])
    assert [row["sample"] for row in read_lines(tmp_path / "records.jsonl")] == ["a", "b", "c"]
    assert not list(tmp_path.glob("records.part*"))
