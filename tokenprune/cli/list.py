"""The command `tokenprune list`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenprune.cli.listing import COMPACT, KINDS, as_markdown, format_json, print_compact, print_table
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.cli.status import hide_transformers_warnings, show_status


@dataclass(frozen=True)
class ListConfig:
    """Options of `tokenprune list`.

    Args:
        kind: kind of entries to list.
        plugin: Python files whose classes are also listed.
        json: print JSON.
        markdown: print a Markdown table.
        details: print all properties of each entry.
    """

    kind: str = field(metadata={"choices": list(KINDS)})
    plugin: list[str] = field(default_factory=list)
    json: bool = False
    markdown: bool = False
    details: bool = False


def run(argv: Sequence[str]) -> None:
    """Run the command `list`."""
    description = "List strategies, components or models; --details adds their parameters and further properties."
    config = select_fields(ListConfig, parse_options(build_parser("tokenprune list", description, ListConfig), argv))
    with hide_transformers_warnings(), show_status(f"reading {config.kind}"):
        rows = KINDS[config.kind](config.plugin)
    if config.json:
        print(format_json(rows))
    elif config.markdown:
        print(as_markdown(rows))
    elif config.details:
        print_table(rows)
    else:
        print_compact(rows, COMPACT[config.kind])
