"""The command `tokenprune list`."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from tokenprune.cli.errors import add_flag, user_error
from tokenprune.cli.listing import KINDS, as_json, as_markdown, as_table


def run(argv: Sequence[str]) -> None:
    """Run the command `list`."""
    parser = ArgumentParser(
        prog="tokenprune list",
        exit_on_error=False,
        allow_abbrev=False,
        description="List what is known by name, with its parameters.",
    )
    parser.add_argument("kind", choices=list(KINDS), help="what to list")
    parser.add_argument("--plugin", type=str, nargs="+", default=[], help="Python files whose classes are listed too")
    add_flag(parser, "--json", "print JSON")
    add_flag(parser, "--markdown", "print a Markdown table")
    try:
        config = parser.parse_args(list(argv))
        rows = KINDS[config.kind](config.plugin)
    except (LookupError, ArgumentError) as error:
        raise user_error(error, parser) from error
    if config.json:
        print(as_json(rows))
    elif config.markdown:
        print(as_markdown(rows))
    else:
        as_table(rows)
