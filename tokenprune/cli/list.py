"""The command `tokenprune list`."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from tokenprune.cli.errors import add_flag, user_error
from tokenprune.cli.listing import KINDS, as_markdown, format_json, print_table


def run(argv: Sequence[str]) -> None:
    """Run the command `list`."""
    parser = ArgumentParser(
        prog="tokenprune list",
        exit_on_error=False,
        allow_abbrev=False,
        description="List strategies, components or models, with their parameters.",
    )
    parser.add_argument("kind", choices=list(KINDS), help="kind of entries to list")
    parser.add_argument("--plugin", type=str, nargs="+", default=[], help="Python files whose classes are also listed")
    add_flag(parser, "--json", "print JSON")
    add_flag(parser, "--markdown", "print a Markdown table")
    try:
        config = parser.parse_args(list(argv))
        rows = KINDS[config.kind](config.plugin)
    except (LookupError, ArgumentError) as error:
        raise user_error(error, parser) from error
    if config.json:
        print(format_json(rows))
    elif config.markdown:
        print(as_markdown(rows))
    else:
        print_table(rows)
