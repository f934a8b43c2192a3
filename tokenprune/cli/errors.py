"""Errors of the command line: one line that states the fault and the nearest valid option."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from tokenprune.cli.parsing import format_error

INPUT_ERRORS = (LookupError, ValueError, TypeError, ArgumentError)
"""Errors that wrong options raise while they are parsed and instantiated."""


class UserError(ValueError):
    """An error that the user can correct; shown as one line."""


def user_error(error: Exception, parser: ArgumentParser) -> UserError:
    """Return an error of the command line as one line that names the nearest option.

    Args:
        error: the error that parsing raised.
        parser: the parser of the command.
    """
    return UserError(format_error(error, [option for action in parser._actions for option in action.option_strings]))


def parse_options(parser: ArgumentParser, argv: Sequence[str]) -> Any:
    """Return the options of a command that takes no classes by name.

    Args:
        parser: the parser of the command.
        argv: the arguments after the command.

    Raises:
        UserError: if an option is not valid.
    """
    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        raise user_error(error, parser) from error


def add_flag(parser: ArgumentParser, name: str, help: str) -> None:
    """Add an option that is off by default: `--NAME` turns it on, and a configuration file may set it.

    Args:
        parser: the parser of the command.
        name: the option with its dashes.
        help: its help text.
    """
    parser.add_argument(name, type=bool, nargs="?", const=True, default=False, help=help)
