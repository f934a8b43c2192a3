"""Configured objects as plain data: the form in which records, YAML files and W&B store them."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenprune.policies import Configurable


def import_path(found: type) -> str:
    """Return the dotted path of a class."""
    return f"{found.__module__}.{found.__qualname__}"


def as_config(value: Any) -> Any:
    """Return a configured object as plain data that jsonargparse can build again.

    Args:
        value: something configurable (class path and arguments), another dataclass (its fields), or plain data.
    """
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: as_config(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Configurable):
        return {"class_path": import_path(type(value)), "init_args": fields}
    return fields
