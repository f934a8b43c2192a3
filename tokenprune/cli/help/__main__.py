"""Writes the help of all commands: `python -m tokenprune.cli.help`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress

from tokenprune.cli.help import help_file
from tokenprune.cli.main import COMMANDS, run_command

WIDTH = "100"
"""Columns of the stored texts."""
SUBCOMMANDS = (["bench", "run"], ["bench", "strategies"])
"""Commands of two words with options of their own."""


def format_help(command: Sequence[str]) -> str:
    """Return the help of a command from its parser.

    Args:
        command: the words of the command, such as ``["bench", "run"]``.
    """
    text, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with redirect_stdout(text), suppress(SystemExit):
            run_command([*command, "--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    for words in (*([name] for name in COMMANDS), *SUBCOMMANDS):
        help_file(words).write_text(format_help(words), encoding="utf-8")
