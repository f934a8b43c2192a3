"""A safetensors file with the kept tokens of many images, written one by one; an interrupted run continues.

While a run writes, ``FILE.partial`` holds the tensors, and ``FILE.partial.jsonl`` a line per tensor. The header has its
final size from the beginning, so that the last step fills it in and renames the file. Reading requires only torch and
safetensors, which the environment of a server has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
"""Names of dtypes in safetensors."""
NUMBERS = ("asked", "kept", "valid", "encoded", "newlines", "newlines_full")
"""Fields of `ImageAccount` that an entry holds."""
LARGEST = 10**15
"""A number with at least as many digits as every number in a header."""


def name_tensor(number: int) -> str:
    """Return the name of the tensor of an entry."""
    return f"embedding.{number}"


def build_header(metadata: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the header of a safetensors file as JSON.

    Args:
        metadata: the metadata of the file.
        records: `dtype`, `shape`, `data_offsets` and `entry` of each tensor.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            "metadata": json.dumps(metadata),
            "entries": json.dumps([record["entry"] for record in records]),
        }
    }
    for number, record in enumerate(records):
        header[name_tensor(number)] = {name: record[name] for name in ("dtype", "shape", "data_offsets")}
    return json.dumps(header).encode()


class EmbeddingWriter:
    """Writes a file of embeddings, or continues an interrupted file.

    Args:
        file: the file.
        metadata: all options that determine the tensors.
        requests: the image and question of each tensor, in the order of the file.

    Raises:
        ValueError: if the interrupted file has other metadata or requests.
        RuntimeError: if another process writes the file.
        OSError: if the folder cannot be written.
    """

    def __init__(self, file: Path, metadata: Mapping[str, Any], requests: Sequence[Mapping[str, Any]]) -> None:
        from filelock import FileLock, Timeout

        self._file, self._metadata, self._requests = file, dict(metadata), [dict(request) for request in requests]
        self._partial, self._index = list_partial_files(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(file.with_name(f"{file.name}.partial.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(f"another process writes {file}; wait for it, or give another file") from error
        try:
            self._records = self._read_index()
            self._data = self._partial.open("r+b" if self._records else "wb")
            self._data.seek(self._begin + self._end)
            self._data.truncate()
            text = "".join(json.dumps(line) + "\n" for line in ({"metadata": self._metadata}, *self._records))
            self._lines = self._index.open("w")
            self._lines.write(text)
            self._lines.flush()
        except BaseException:
            self._lock.release()
            raise

    @property
    def done(self) -> int:
        """Number of tensors that are written."""
        return len(self._records)

    @property
    def _end(self) -> int:
        """Length of the tensors in bytes."""
        return int(self._records[-1]["data_offsets"][1]) if self._records else 0

    @property
    def _begin(self) -> int:
        """Position of the first tensor: the size of the largest possible header, and 8 bytes for this size."""
        numbers = dict.fromkeys(NUMBERS, LARGEST)
        widest: dict[str, Any] = {"dtype": "BF16", "shape": [LARGEST] * 2, "data_offsets": [LARGEST] * 2}
        records = [{**widest, "entry": {**request, **numbers}} for request in self._requests]
        return 8 + -(-len(build_header(self._metadata, records)) // 8) * 8

    def _read_index(self) -> list[dict[str, Any]]:
        """Return the records of an interrupted file whose tensors are complete.

        Raises:
            ValueError: if the file was written with other options.
        """
        if not (self._partial.is_file() and self._index.is_file()):
            return []
        remedy = f"delete {self._index} to begin again, or give another file"
        size, begin = self._partial.stat().st_size, self._begin
        lines = list(read_complete_lines(self._index))
        if lines and lines[0] != {"metadata": self._metadata}:
            raise ValueError(f"{self._partial} was written with other options; {remedy}")
        records = [record for record in lines[1:] if begin + record["data_offsets"][1] <= size]
        for number, record in enumerate(records):
            request = {name: value for name, value in record["entry"].items() if name not in NUMBERS}
            if number >= len(self._requests) or request != self._requests[number]:
                raise ValueError(f"{self._partial} was written for other images or questions; {remedy}")
        return records

    def add(self, tensor: Tensor, account: Mapping[str, int]) -> None:
        """Write the tensor of the next request.

        Args:
            tensor: the kept tokens, `[kept, dim]`.
            account: the numbers of tokens, by the names in `NUMBERS`.

        Raises:
            OSError: if the disk is full; the tensors before stay complete.
        """
        import torch

        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        self._data.write(data)
        self._data.flush()
        record = {
            "dtype": DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + len(data)],
            "entry": {**self._requests[self.done], **{name: account[name] for name in NUMBERS}},
        }
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        self._records.append(record)

    def finish(self) -> None:
        """Write the header, and give the complete file its name."""
        begin, header = self._begin, build_header(self._metadata, self._records)
        self._data.seek(0)
        self._data.write((begin - 8).to_bytes(8, "little") + header.ljust(begin - 8))
        self._data.flush()
        os.fsync(self._data.fileno())
        self._partial.replace(self._file)
        self._index.unlink()
        Path(self._lock.lock_file).unlink()

    def __enter__(self) -> EmbeddingWriter:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files; an incomplete file remains, to be continued."""
        try:
            self._data.close()
            self._lines.close()
        finally:
            self._lock.release()


def list_partial_files(file: Path) -> tuple[Path, Path]:
    """Return the files with the tensors and with the records of an interrupted run.

    Args:
        file: the complete file.
    """
    return file.with_name(f"{file.name}.partial"), file.with_name(f"{file.name}.partial.jsonl")


def read_complete_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of a file until the first incomplete line, which a crash left."""
    for line in file.read_text().split("\n"):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def read_metadata(file: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the metadata of a file of embeddings, and its entries.

    Args:
        file: the file.

    Raises:
        ValueError: if the file was not written by `tokenprune encode`.
    """
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        texts = opened.metadata() or {}
    if not {"metadata", "entries"} <= texts.keys():
        raise ValueError(f"{file} holds no embeddings; write the file with `tokenprune encode`")
    return json.loads(texts["metadata"]), json.loads(texts["entries"])


def read_embeddings(file: str | Path) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield the kept tokens `[kept, dim]` and the entry of each image of a file, one after another.

    Args:
        file: the file.

    Raises:
        ValueError: if the file was not written by `tokenprune encode`.
    """
    from safetensors import safe_open

    _, entries = read_metadata(file)
    with safe_open(str(file), framework="pt") as opened:
        for number, entry in enumerate(entries):
            yield opened.get_tensor(name_tensor(number)), entry
