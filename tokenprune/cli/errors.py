"""Formats errors of the command line as one line with the fault and the most similar valid option."""

from __future__ import annotations

import errno
from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from tokenprune.cli.parsing import format_error

INPUT_ERRORS = (LookupError, ValueError, TypeError, ArgumentError)
"""Errors that parsing and instantiating wrong options can raise."""


FILE_HINTS = {
    errno.ENOSPC: "free space, then run the same command again",
    errno.EDQUOT: "free space, then run the same command again",
    errno.EACCES: "choose a folder that you can write, such as with --out",
    errno.EPERM: "choose a folder that you can write, such as with --out",
    errno.EROFS: "choose a folder that you can write, such as with --out",
}
"""What to do after an error of the file system, by its number."""


class UserError(ValueError):
    """An error that the user can correct; it is printed as one line."""


class MultipleUserError(UserError):
    """Several errors that the user can correct; each is printed on a line.

    Args:
        heading: the common fault.
        problems: the errors.
    """

    def __init__(self, heading: str, problems: Sequence[str]) -> None:
        super().__init__("\n  ".join([f"{heading}:", *problems]))
        self.lines = [f"{heading}:", *(f"  {' '.join(problem.split())}" for problem in problems)]


def format_failure(error: Exception) -> str:
    """Return an error as text for stderr: one line, or one line for each of several errors.

    Args:
        error: the error.
    """
    if isinstance(error, MultipleUserError):
        return "\n".join(error.lines)
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        hint = FILE_HINTS.get(error.errno or 0)
        return f"{file}{error.strerror}{f'; {hint}' if hint else ''}"
    return " ".join(str(error).split()) or type(error).__name__


def user_error(error: Exception, parser: ArgumentParser) -> UserError:
    """Return an error of the command line as one line, with the most similar option if an option is unknown.

    Args:
        error: the error from parsing.
        parser: the parser of the command.
    """
    return UserError(format_error(error, [option for action in parser._actions for option in action.option_strings]))
