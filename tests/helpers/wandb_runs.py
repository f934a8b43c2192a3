"""Offline W&B runs and their content."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def forget_account(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Hide the keys, settings and caches of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.setenv("NETRC", str(folder / "netrc"))
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        patch.setenv(f"WANDB_{name}", str(folder / "wandb-home"))


def read_back(folder: Path) -> Iterator[Any]:
    """Yield the records of an offline run: after a header, LevelDB's log of 32 kB blocks, records cut into chunks."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = folder.glob("run-*.wandb")
    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for the header of a chunk: the rest of the block is empty
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record = proto.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values(items: Any) -> dict[str, Any]:
    """Updates as a dictionary; the path of a nested one joined by dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def media(run: SimpleNamespace, key: str) -> Any:
    """What was logged under a key that holds a table or an image."""
    found: dict[str, Any] = {}
    for row in run.history:
        for name, value in row.items():
            if name == key:
                found |= value
            elif name.startswith(f"{key}."):
                found[name.removeprefix(f"{key}.")] = value
    return found
