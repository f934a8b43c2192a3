"""Renders a report as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenprune.experiments.analysis.report.blocks import Block, Heading, Image, ImageRow, Table, Text


def render_markdown(blocks: Iterable[Block]) -> str:
    """Return a report as Markdown.

    Args:
        blocks: the blocks of the report.
    """
    return "\n\n".join(RENDERERS[block.kind](block) for block in blocks) + "\n"


def _render_heading(block: Heading) -> str:
    return f"{'#' * block.level} {block.text}"


def _render_text(block: Text) -> str:
    return "\n".join(f"- {line}" for line in block.lines) if block.bullets else "\n\n".join(block.lines)


def _render_image(block: Image) -> str:
    return f"![{block.caption.split('.')[0]}]({block.path})\n\n{block.caption}"


def _render_image_row(block: ImageRow) -> str:
    images = [f"![{head}]({path})" for head, path in zip(block.heads, block.paths, strict=False)]
    return _render_rows([block.heads, *([images] if images else []), block.captions])


def _render_table(block: Table) -> str:
    return _render_rows([block.head, *block.rows])


def _render_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first row is the head."""
    head, *body = rows
    # A bar ends an entry even inside code.
    texts = [[entry.replace("|", "\\|") for entry in row] for row in (head, ["---"] * len(head), *body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in texts)


RENDERERS: Mapping[str, Callable[[Any], str]] = {
    Heading.kind: _render_heading,
    Text.kind: _render_text,
    Table.kind: _render_table,
    Image.kind: _render_image,
    ImageRow.kind: _render_image_row,
}
"""Function that renders a block, by its kind."""
