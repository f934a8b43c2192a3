"""Records of an experiment: one JSON line a sample, flushed at once, so that a crash loses nothing that was done.

The folder of a setting (one experiment) holds ``records.jsonl``. If processes share its samples, each appends to its
own part, ``records.part-<rank>.jsonl``, and `merge` joins the parts in the order of the samples.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

NAME = "records.jsonl"
LOCK = ".lock"
IN_USE = "another process writes to {}; wait for it, or give another --out. To share the work, use --workers or --shard"


class InUseError(RuntimeError):
    """Another process writes the same records."""


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; a last line that a crash has torn is left out.

    Raises:
        ValueError: if another line is no JSON.
    """
    if file.is_file():
        yield from _parsed(file.read_text(), file)


def _parsed(text: str, file: Path) -> Iterator[dict[str, Any]]:
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: it was being written
                return
            raise ValueError(f"{file}, line {number} is no record ({error}); remove the line to go on") from error


def files_of(setting: Path) -> list[Path]:
    """Return the files that hold records of a setting."""
    return [file for file in (setting / NAME, *sorted(setting.glob("records.part-*.jsonl"))) if file.is_file()]


def done(setting: Path) -> set[str]:
    """Return the ids of the samples of a setting that have a record."""
    return {record["sample"] for file in files_of(setting) for record in read_lines(file)}


def merge(setting: Path, order: Sequence[str]) -> None:
    """Put the parts of a setting together into one file, in the order of the samples; each sample once.

    Args:
        setting: the folder of the setting.
        order: ids of all samples.
    """
    if files_of(setting) == [setting / NAME]:
        return
    found: dict[str, dict[str, Any]] = {}
    for file in files_of(setting):
        for record in read_lines(file):
            found.setdefault(record["sample"], record)
    place = {sample: number for number, sample in enumerate(order)}
    merged = sorted(found.values(), key=lambda record: place.get(record["sample"], len(place)))
    write_whole(setting / NAME, "".join(json.dumps(record) + "\n" for record in merged))
    for file in setting.glob("records.part-*.jsonl"):
        file.unlink()


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def locked(file: Path, kind: int) -> IO[str] | None:
    """Return a lock file that is held until it is closed; None if another process holds it.

    Args:
        file: the lock file.
        kind: ``fcntl.LOCK_EX`` for one holder, ``fcntl.LOCK_SH`` for several that share it.
    """
    lock = file.open("w")
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def join(setting: Path, order: Sequence[str]) -> None:
    """Put the parts of a setting together if all samples are there and no process writes them any more.

    Every process that shares the samples calls this when it has closed its part; the last one finds no other.

    Args:
        setting: the folder of the setting.
        order: ids of all samples.
    """
    lock = locked(setting / LOCK, fcntl.LOCK_EX)
    if lock is not None:
        with lock:
            if set(order) <= done(setting):
                merge(setting, order)


def discard(setting: Path) -> None:
    """Remove the records of a setting and what was computed from them.

    Args:
        setting: the folder of the setting.

    Raises:
        InUseError: if another process has the records open.
    """
    if not setting.is_dir():
        return
    lock = locked(setting / LOCK, fcntl.LOCK_EX)
    if lock is None:
        raise InUseError(IN_USE.format(setting))
    with lock:
        for file in (*files_of(setting), setting / "identity.json", setting / "summary.json"):
            file.unlink(missing_ok=True)


def forget_errors(setting: Path) -> int:
    """Take the records of samples that failed out of a setting, so that they are tried again; return their number.

    Args:
        setting: the folder of the setting.

    Raises:
        InUseError: if another process has the records open.
    """
    if not files_of(setting):
        return 0
    lock = locked(setting / LOCK, fcntl.LOCK_EX)
    if lock is None:
        raise InUseError(IN_USE.format(setting))
    number = 0
    with lock:
        for file in files_of(setting):
            records = list(read_lines(file))
            good = [record for record in records if record["error"] is None]
            if len(good) < len(records):
                write_whole(file, "".join(json.dumps(record) + "\n" for record in good))
                number += len(records) - len(good)
    return number


class RecordFile:
    """The open records of one setting, for one process.

    Args:
        setting: the folder of the setting; made if it is not there.
        rank: number of this process among those that share the samples; None if it has them all.

    Raises:
        InUseError: if another process has them open: any other one if this process has all samples, otherwise one that
            has them all or the same rank.
        OSError: if the folder cannot be written.
    """

    def __init__(self, setting: Path, rank: int | None = None) -> None:
        setting.mkdir(parents=True, exist_ok=True)
        self.file = setting / (NAME if rank is None else f"records.part-{rank}.jsonl")
        wanted = [(LOCK, fcntl.LOCK_EX)] if rank is None else [(LOCK, fcntl.LOCK_SH), (f"{LOCK}.{rank}", fcntl.LOCK_EX)]
        self._locks: list[IO[str]] = []
        for name, kind in wanted:
            lock = locked(setting / name, kind)
            if lock is None:
                self._unlock()
                raise InUseError(IN_USE.format(setting))
            self._locks.append(lock)
        records = [one for other in files_of(setting) if other != self.file for one in read_lines(other)]
        text = self.file.read_text() if self.file.is_file() else ""
        own = list(_parsed(text, self.file))
        whole = "".join(json.dumps(record) + "\n" for record in own)
        if text != whole:
            write_whole(self.file, whole)  # a torn last line goes
        self.done = {record["sample"] for record in (*records, *own)}
        self.failed = {record["sample"] for record in (*records, *own) if record.get("error") is not None}
        self._out = self.file.open("a")

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record and flush it.

        Raises:
            OSError: if it cannot be written; what was written before stays whole.
        """
        if record["sample"] in self.done:
            raise ValueError(f"sample {record['sample']!r} has a record already")
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()
        self.done.add(record["sample"])

    def close(self) -> None:
        """Close the file and let others in."""
        try:
            self._out.close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        for lock in self._locks:
            lock.close()

    def __enter__(self) -> RecordFile:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()
