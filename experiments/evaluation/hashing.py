"""Computes hashes of files, once for each state of a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class FileState:
    """Hash of a file, with the size and times that show an unchanged file without reading it.

    Args:
        size: bytes.
        mtime_ns: time of the last change of the content, in nanoseconds.
        ctime_ns: time of the last change of the inode, in nanoseconds; tools that copy or extract files cannot set it.
        sha256: hash of the content.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


@cache
def _hash_content(path: Path, size: int, mtime_ns: int, ctime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, read once per process unless the file changes.

    Args:
        path: the file.

    Raises:
        OSError: if the file cannot be read.
    """
    return file_state(Path(path)).sha256


def file_state(path: Path, previous: FileState | None = None) -> FileState:
    """Return size, times and hash of a file.

    Args:
        path: the file.
        previous: an earlier state of the file; if size and times are equal, its hash is returned without a read.

    Raises:
        OSError: if the file cannot be read.
    """
    stat = path.stat()
    times = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    if previous is not None and times == (previous.size, previous.mtime_ns, previous.ctime_ns):
        return previous
    return FileState(*times, _hash_content(path.resolve(), *times))
