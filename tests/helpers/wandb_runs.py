"""Functions that read offline W&B runs."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def hide_account(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Hide the W&B keys, settings and caches of the user from a test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.setenv("NETRC", str(folder / "netrc"))
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        patch.setenv(f"WANDB_{name}", str(folder / "wandb-home"))


def read_records(folder: Path) -> Iterator[Any]:
    """Yield the records of an offline run.

    The file is a header, then a LevelDB log: blocks of 32 kB that hold chunks of records.
    """
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = folder.glob("run-*.wandb")
    data, offset, record_bytes = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:  # the block ends before another header of a chunk fits: skip its padding
            offset += 32768 - offset % 32768
            continue
        length, kind = struct.unpack("<HB", data[offset + 4 : offset + 7])
        record_bytes += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a complete record, or the last chunk of a record
            record = proto.Record()
            record.ParseFromString(record_bytes)
            yield record
            record_bytes = b""


def values(items: Any) -> dict[str, Any]:
    """Return updates as a dictionary; the keys of a nested update are joined by dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def media(run: SimpleNamespace, key: str) -> Any:
    """Return the fields of a table or an image that was logged under a key."""
    fields: dict[str, Any] = {}
    for row in run.history:
        for name, value in row.items():
            if name == key:
                fields |= value
            elif name.startswith(f"{key}."):
                fields[name.removeprefix(f"{key}.")] = value
    return fields
