"""Reads and writes the records of an experiment: one JSON line per sample, flushed at once, so that a crash loses none.

The folder of a setting (one experiment) holds ``records.jsonl``. If processes share its samples, each process appends
to a part, ``records.part-<rank>.jsonl``, and `merge_records` joins the parts in the order of the samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

NAME = "records.jsonl"
RECORD_FIELDS: Mapping[str, str] = {
    "sample": "id of the sample, unique in its task",
    "group": "name of the image; intervals resample groups",
    "question": "the question",
    "answer": "the accepted answer, or a list if there are several",
    "prediction": "the answer of the model; empty after an error",
    "score": "score from 0 to 1",
    "correct": "whether the score is at least 0.5",
    "type": "kind of question, if the task has kinds",
    "split": "kind of difficulty, if the task has kinds",
    "asked": "number of visual tokens that the budget grants",
    "kept": "number of visual tokens that entered the LLM",
    "valid": "number of visual tokens that enter the LLM without reduction",
    "kept_per_tile": "kept tokens of each tile, base tile first",
    "newlines": "number of newline tokens that entered the LLM",
    "cuts": "list with the layer, the asked and the kept tokens of each cut inside the LLM",
    "average_tokens": "visual tokens, averaged over the layers of the LLM",
    "tokens_per_layer": "prompt tokens of each layer of the LLM",
    "prompt_length": "prompt tokens that entered the LLM",
    "prompt_length_full": "prompt tokens without reduction",
    "prefill_flops": "FLOPs of the prefill of the LLM",
    "prefill_flops_full": "FLOPs of the prefill without reduction",
    "evidence_coverage": "share of the evidence of the answer that kept tokens cover; null without evidence",
    "tower_patches": "patches in the vision tower, summed over tiles and layers; 0 if no strategy acts inside it",
    "tower_patches_full": "these patches without reduction",
    "tower_flops": "FLOPs of the vision tower, on the first images if a strategy acts before or inside it; else null",
    "tower_flops_full": "FLOPs of the vision tower of the unmodified model, for the same samples; else null",
    "encode_ms": "milliseconds of encoding the image, shared by all settings of an ablation",
    "select_ms": "milliseconds of selecting tokens and preparing the inputs, per question",
    "generate_ms": "milliseconds of `generate`, per question",
    "image": "name of the image",
    "error": "text of the error if the sample failed, otherwise null",
    "prepare_alone_ms": "milliseconds of encoding and selection of this setting alone, on the first images; else null",
    "stored_image": "file of the stored tiles, relative to the run directory; null if the image is not stored",
    "selection": "kept tokens of a stored image as compressed bits, with the layout; otherwise null",
    "sample_digest": "hash of question, answers and image, by which a changed data set is noticed",
}
"""Fields of a record, in their order, and their meanings."""
LOCK = ".lock"
START_SECONDS = 2.0
"""Longest time in seconds for which a process holds the lock of a setting while it starts."""
IN_USE = "another process writes to {}; wait for it, or give another --out. To share the work, use --workers or --shard"


class InUseError(RuntimeError):
    """Raised if another process writes the same records."""


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; an incomplete last line, left by a crash, is skipped.

    Raises:
        ValueError: if any other line is no JSON.
    """
    if file.is_file():
        yield from _parse_lines(file.read_text(), file)


def _parse_lines(text: str, file: Path) -> Iterator[dict[str, Any]]:
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the write was interrupted
                return
            raise ValueError(f"{file}, line {number} is no record ({error}); remove the line to continue") from error


def list_record_files(setting: Path) -> list[Path]:
    """Return the files that hold records of a setting."""
    return [file for file in (setting / NAME, *sorted(setting.glob("records.part-*.jsonl"))) if file.is_file()]


def list_recorded_samples(setting: Path) -> set[str]:
    """Return the ids of the samples of a setting that have a record."""
    return {record["sample"] for file in list_record_files(setting) for record in read_lines(file)}


def merge_records(setting: Path, order: Sequence[str]) -> None:
    """Merge the parts of a setting into one file, in the order of the samples, each sample once.

    Args:
        setting: the folder of the setting.
        order: ids of all samples.
    """
    if list_record_files(setting) == [setting / NAME]:
        return
    records: dict[str, dict[str, Any]] = {}
    for file in list_record_files(setting):
        for record in read_lines(file):
            records.setdefault(record["sample"], record)
    position = {sample: number for number, sample in enumerate(order)}
    merged = sorted(records.values(), key=lambda record: position.get(record["sample"], len(position)))
    write_atomically(setting / NAME, "".join(json.dumps(record) + "\n" for record in merged))
    for file in setting.glob("records.part-*.jsonl"):
        file.unlink()


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file completely or not at all: write a temporary file, then rename it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def lock_setting(setting: Path, wait: float = 0) -> ExitStack | None:
    """Lock all records of a setting for this process, and return the stack that releases the lock.

    Args:
        setting: the folder of the setting.
        wait: seconds to wait for a process that holds the lock only while it starts or merges.

    Returns:
        None if another process has the records or a part of them open.
    """
    with ExitStack() as locks:
        try:
            locks.enter_context(FileLock(setting / LOCK).acquire(timeout=wait))
            for part in setting.glob(f"{LOCK}.*"):
                locks.enter_context(FileLock(part).acquire(timeout=0))
        except Timeout:
            return None
        return locks.pop_all()


def lock_part(setting: Path, rank: int) -> ExitStack | None:
    """Lock the part of one process, and return the stack that releases the lock.

    Args:
        setting: the folder of the setting.
        rank: index of this process.

    Returns:
        None if another process has all records or the same part open.
    """
    with ExitStack() as locks:
        try:
            with FileLock(setting / LOCK).acquire(timeout=START_SECONDS):
                locks.enter_context(FileLock(setting / f"{LOCK}.{rank}").acquire(timeout=0))
        except Timeout:
            return None
        return locks.pop_all()


def merge_if_complete(setting: Path, order: Sequence[str]) -> None:
    """Merge the parts of a setting if all samples have a record and no process writes a part.

    Every process that shares the samples calls this after it has closed its part; the last process merges.

    Args:
        setting: the folder of the setting.
        order: ids of all samples.
    """
    lock = lock_setting(setting, wait=START_SECONDS)
    if lock is not None:
        with lock:
            if set(order) <= list_recorded_samples(setting):
                merge_records(setting, order)


def delete_records(setting: Path) -> None:
    """Delete the records of a setting, its identity and its summary.

    Args:
        setting: the folder of the setting.

    Raises:
        InUseError: if another process has the records open.
    """
    if not setting.is_dir():
        return
    lock = lock_setting(setting)
    if lock is None:
        raise InUseError(IN_USE.format(setting))
    with lock:
        for file in (*list_record_files(setting), setting / "identity.json", setting / "summary.json"):
            file.unlink(missing_ok=True)


def remove_failed(setting: Path) -> int:
    """Remove the error records of a setting, so that these samples run again, and return their number.

    Args:
        setting: the folder of the setting.

    Raises:
        InUseError: if another process has the records open.
    """
    if not list_record_files(setting):
        return 0
    lock = lock_setting(setting)
    if lock is None:
        raise InUseError(IN_USE.format(setting))
    number = 0
    with lock:
        for file in list_record_files(setting):
            records = list(read_lines(file))
            answered = [record for record in records if record["error"] is None]
            if len(answered) < len(records):
                write_atomically(file, "".join(json.dumps(record) + "\n" for record in answered))
                number += len(records) - len(answered)
    return number


class RecordFile:
    """The open record file of one setting, locked for one process.

    Args:
        setting: the folder of the setting; created if it does not exist.
        rank: index of this process among the processes that share the samples; None if this process runs all samples.

    Raises:
        InUseError: if another process has the records open: any process if `rank` is None, otherwise a process with the
            same rank or with rank None.
        OSError: if the folder cannot be written.
    """

    def __init__(self, setting: Path, rank: int | None = None) -> None:
        setting.mkdir(parents=True, exist_ok=True)
        self.file = setting / (NAME if rank is None else f"records.part-{rank}.jsonl")
        lock = lock_setting(setting) if rank is None else lock_part(setting, rank)
        if lock is None:
            raise InUseError(IN_USE.format(setting))
        self._lock = lock
        parts = [file for file in list_record_files(setting) if file != self.file]
        records = [record for part in parts for record in read_lines(part)]
        text = self.file.read_text() if self.file.is_file() else ""
        lines = list(_parse_lines(text, self.file))
        records += lines
        complete = "".join(json.dumps(record) + "\n" for record in lines)
        if text != complete:
            write_atomically(self.file, complete)  # removes an incomplete last line
        self.done = {record["sample"] for record in records}
        self.failed = {record["sample"] for record in records if record.get("error") is not None}
        self._out = self.file.open("a")

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record and flush the file.

        Raises:
            OSError: if the record cannot be written; earlier records stay complete.
            ValueError: if the sample has a record already.
        """
        if record["sample"] in self.done:
            raise ValueError(f"sample {record['sample']!r} has a record already")
        try:
            self._out.write(json.dumps(record) + "\n")
            self._out.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file)) from error
        self.done.add(record["sample"])

    def close(self) -> None:
        """Close the file and release its locks."""
        try:
            self._out.close()
        finally:
            self._lock.close()

    def __enter__(self) -> RecordFile:
        """Return the file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()
