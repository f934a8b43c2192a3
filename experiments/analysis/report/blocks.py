"""Blocks of a report, independent of the output format: headings, text, tables and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias


@dataclass(frozen=True)
class Heading:
    """A heading.

    Args:
        text: the text.
        level: heading level; 1 is the title.
    """

    kind: ClassVar[str] = "heading"

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """Paragraphs or a list; `**bold**` and code in backticks are rendered.

    Args:
        lines: the paragraphs, or the entries of the list.
        bullets: whether the lines are entries of a list.
    """

    kind: ClassVar[str] = "text"

    lines: Sequence[str]
    bullets: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        head: names of the columns.
        rows: rows of entries, with one entry per column.
    """

    kind: ClassVar[str] = "table"

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Image:
    """A figure.

    Args:
        path: path of the file, relative to the report.
        caption: description of the figure.
    """

    kind: ClassVar[str] = "image"

    path: str
    caption: str


@dataclass(frozen=True)
class ImageRow:
    """Figures next to each other.

    Args:
        heads: text above each figure.
        captions: text below each figure.
        paths: paths of the files, relative to the report; empty if only the texts are shown.
    """

    kind: ClassVar[str] = "image row"

    heads: Sequence[str]
    captions: Sequence[str]
    paths: Sequence[str] = ()


Block: TypeAlias = Heading | Text | Table | Image | ImageRow
