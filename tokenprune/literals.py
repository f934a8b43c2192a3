"""Checks options that accept a fixed set of values, which a `Literal` annotation lists."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, Literal, get_args, get_origin


def check_literal(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    """Check that an option has one of its values.

    Args:
        name: name of the option, for the error.
        value: its value.
        allowed: the values of its `Literal`.

    Raises:
        ValueError: if the value is not one of them; the error lists them.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}")


def check_literal_fields(instance: object) -> None:
    """Check that each `Literal` field of a dataclass instance has one of its values.

    Args:
        instance: the instance.

    Raises:
        ValueError: if the value of a field is not one of its values.
    """
    for name, allowed in _literal_fields(type(instance)).items():  # type: ignore[arg-type]
        check_literal(name, getattr(instance, name), allowed)


@cache
def _literal_fields(cls: type) -> dict[str, tuple[Any, ...]]:
    """Return the values of the `Literal` fields of a class by name."""
    annotations = {}
    for base in reversed(cls.__mro__):
        for name, annotation in vars(base).get("__annotations__", {}).items():
            if isinstance(annotation, str):
                try:
                    annotation = eval(annotation, vars(sys.modules[base.__module__]))
                except Exception:  # a name that exists for type checkers only; it is no `Literal`
                    annotation = None
            annotations[name] = annotation
    return {name: get_args(literal) for name, literal in annotations.items() if get_origin(literal) is Literal}
