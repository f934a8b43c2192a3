"""Formats errors of the command line as one line with the fault and the most similar valid option."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from tokenprune.cli.parsing import format_error

INPUT_ERRORS = (LookupError, ValueError, TypeError, ArgumentError)
"""Errors that parsing and instantiating wrong options can raise."""


class UserError(ValueError):
    """An error that the user can correct; it is printed as one line."""


def user_error(error: Exception, parser: ArgumentParser) -> UserError:
    """Return an error of the command line as one line, with the most similar option if an option is unknown.

    Args:
        error: the error from parsing.
        parser: the parser of the command.
    """
    return UserError(format_error(error, [option for action in parser._actions for option in action.option_strings]))


def parse_options(parser: ArgumentParser, argv: Sequence[str]) -> Any:
    """Return the parsed options of a command without options for class names.

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
    """Add an option that is off by default. ``--NAME`` turns it on, and a configuration file can set it.

    Args:
        parser: the parser of the command.
        name: the option with its dashes.
        help: the help text.
    """
    parser.add_argument(name, type=bool, nargs="?", const=True, default=False, help=help)
