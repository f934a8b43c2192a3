"""Checks options that accept a fixed set of values, which a `Literal` annotation lists."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, Literal, get_args, get_origin


def check_literal(name: str, value: object, literal: Any) -> None:
    """Check that an option has one of the values of a `Literal`.

    Args:
        name: name of the option, for the error.
        value: its value.
        literal: the `Literal`.

    Raises:
        ValueError: if the value is not one of them; the error lists them.
    """
    if value not in get_args(literal):
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, get_args(literal)))}")


def check_literal_fields(instance: object, prefix: str = "") -> None:
    """Check that each `Literal` field of a dataclass instance has one of its values.

    Args:
        instance: the instance.
        prefix: text before the name of the field in the error.

    Raises:
        ValueError: if the value of a field is not one of its values.
    """
    for name, literal in _literal_fields(type(instance)).items():  # type: ignore[arg-type]
        check_literal(prefix + name, getattr(instance, name), literal)


@cache
def _literal_fields(cls: type) -> dict[str, Any]:
    """Return the `Literal` annotations of the fields of a class by name."""
    annotations = {}
    for base in reversed(cls.__mro__):
        for name, annotation in vars(base).get("__annotations__", {}).items():
            if isinstance(annotation, str):
                try:
                    annotation = eval(annotation, vars(sys.modules[base.__module__]))
                except Exception:  # a name that exists for type checkers only; it is no `Literal`
                    annotation = None
            annotations[name] = annotation
    return {name: annotation for name, annotation in annotations.items() if get_origin(annotation) is Literal}
