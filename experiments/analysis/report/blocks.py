"""What a report is made of: headings, text, tables and images, before they take a form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Heading:
    """A heading.

    Args:
        text: the text.
        level: 1 for the title.
    """

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list; `**bold**` and code in backticks are understood.

    Args:
        lines: one paragraph each, or one entry each.
        bullets: whether they are entries of a list.
    """

    lines: Sequence[str]
    bullets: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        head: names of the columns.
        rows: entries, one for each column.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Image:
    """A figure.

    Args:
        path: the file, relative to the report.
        caption: what it shows.
    """

    path: str
    caption: str


@dataclass(frozen=True)
class Sides:
    """Figures beside each other.

    Args:
        heads: what stands above each.
        captions: what stands below each.
        paths: their files, relative to the report; empty if there are only words.
    """

    heads: Sequence[str]
    captions: Sequence[str]
    paths: Sequence[str] = ()


Block: TypeAlias = Heading | Text | Table | Image | Sides
