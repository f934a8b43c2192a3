"""The help of each command as stored text, so that `--help` imports no command.

Commands import torch and transformers, which takes seconds. `python -m tokenprune.cli.help` writes the texts from the
parsers of the commands. A test compares them with the parsers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
"""The folder of the texts, one file per command."""


def read_help(arguments: Sequence[str]) -> str | None:
    """Return the help that a command line requests; None if it requests none, or the command has no stored help.

    Args:
        arguments: the arguments after `tokenprune`.
    """
    if not {"-h", "--help"} & set(arguments):
        return None
    files = [help_file(arguments[:number]) for number in (2, 1) if all(map(str.isalpha, arguments[:number]))]
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)


def help_file(command: Sequence[str]) -> Path:
    """Return the file of the help of a command.

    Args:
        command: the words of the command, such as ``["bench", "run"]``.
    """
    return FOLDER / f"{'-'.join(command)}.txt"
