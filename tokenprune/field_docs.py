"""Adds the options that a dataclass inherits to the ``Args:`` section of its docstring, for `help` and notebooks."""

from __future__ import annotations

import inspect
import re

SECTION = re.compile(r"\n\n(?=(?:Args|Attributes|Example|Examples|Note|Raises|Returns):\n)")
"""The start of a section of a docstring."""


def inherit_field_docs(cls: type) -> str | None:
    """Return the docstring of a class with the options that its base classes describe; None without a docstring.

    Args:
        cls: a dataclass whose base classes have complete docstrings.
    """
    if cls.__dict__.get("__doc__") is None:
        return None
    sections = SECTION.split(inspect.cleandoc(cls.__dict__["__doc__"]))
    own = next((section for section in sections if section.startswith("Args:")), "Args:")
    entries: dict[str, str] = {}
    for base in reversed(cls.__mro__[1:]):
        inherited = SECTION.split(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
        entries |= read_entries(next((section for section in inherited if section.startswith("Args:")), ""))
    entries |= read_entries(own)
    if not entries:
        return cls.__dict__["__doc__"]
    text = "\n".join(["Args:", *entries.values()])
    parts = [section for section in sections if section is not own]
    return "\n\n".join([parts[0], text, *parts[1:]])


def read_entries(section: str) -> dict[str, str]:
    """Return the entries of an ``Args:`` section by name, with their indentation.

    Args:
        section: the section with its heading.
    """
    blocks = re.split(r"\n(?=    \S)", section)[1:]
    return {block.strip().partition(":")[0]: block.rstrip() for block in blocks}
