"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune.experiments.report.blocks import Block, Heading, Picture, Text


def markdown(blocks: Iterable[Block]) -> str:
    """Return a report as Markdown.

    Args:
        blocks: the report.
    """
    out = []
    for block in blocks:
        if isinstance(block, Heading):
            out.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            out.append("\n".join(f"- {line}" for line in block.lines) if block.bullets else "\n\n".join(block.lines))
        elif isinstance(block, Picture):
            out.append(f"![{block.caption.split('.')[0]}]({block.path})\n\n{block.caption}")
        else:
            lines = [block.head, ["---"] * len(block.head), *block.rows]
            # Even inside code a bar ends an entry.
            out.append(
                "\n".join(f"| {' | '.join(entry.replace('|', chr(92) + '|') for entry in line)} |" for line in lines)
            )
    return "\n\n".join(out) + "\n"
