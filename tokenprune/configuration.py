"""Conversion of configured objects to plain data, as records, YAML files and W&B store them."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenprune.policies import Configurable


def import_path(cls: type) -> str:
    """Return the dotted import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def as_config(value: Any) -> Any:
    """Return a configured object as plain data that jsonargparse can build again.

    Args:
        value: a `Configurable` (class path and arguments), another dataclass (its fields), a sequence of these (a
            list), or plain data.
    """
    if isinstance(value, list | tuple):
        return [as_config(entry) for entry in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: as_config(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Configurable):
        return {"class_path": import_path(type(value)), "init_args": fields}
    return fields
