"""Renders a report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenprune.experiments.analysis.report.blocks import Block, Heading, Image, ImageRow, Text


def render_markdown(blocks: Iterable[Block]) -> str:
    """Return a report as Markdown.

    Args:
        blocks: the blocks of the report.
    """
    out = []
    for block in blocks:
        if isinstance(block, Heading):
            out.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            out.append("\n".join(f"- {line}" for line in block.lines) if block.bullets else "\n\n".join(block.lines))
        elif isinstance(block, Image):
            out.append(f"![{block.caption.split('.')[0]}]({block.path})\n\n{block.caption}")
        elif isinstance(block, ImageRow):
            images = [f"![{head}]({path})" for head, path in zip(block.heads, block.paths, strict=False)]
            out.append(_table([block.heads, *([images] if images else []), block.captions]))
        else:
            out.append(_table([block.head, *block.rows]))
    return "\n\n".join(out) + "\n"


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    # A bar ends an entry even inside code.
    texts = [[entry.replace("|", "\\|") for entry in line] for line in (head, ["---"] * len(head), *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)
