"""Formats errors of the command line as one line with the fault and the most similar valid option."""

from __future__ import annotations

from argparse import ArgumentError

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
