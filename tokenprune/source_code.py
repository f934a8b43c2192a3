"""Finds the file and line of a user's class, and of the user's code that raised an error."""

from __future__ import annotations

import difflib
import inspect
import sysconfig
import traceback
from pathlib import Path

LIBRARY_FOLDERS = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
"""The folders of the standard library and of installed packages."""


def locate_class(cls: type) -> str:
    """Return the file and line of a class as `` (FILE:LINE)``; empty for classes of the library.

    Args:
        cls: the class.
    """
    if cls.__module__.startswith("tokenprune."):
        return ""
    try:
        return f" ({format_place(inspect.getsourcefile(cls) or '', inspect.getsourcelines(cls)[1])})"
    except (OSError, TypeError):  # defined without a file
        return ""


def describe_abstract_class(cls: type) -> str:
    """Return the methods that a class lacks, with file and line; empty if it lacks none.

    Args:
        cls: a strategy, a component or another configurable class.
    """
    lacking = sorted(getattr(cls, "__abstractmethods__", ()))
    if not lacking:
        return ""
    defined = [name for name, member in vars(cls).items() if inspect.isfunction(member)]
    similar = {name: difflib.get_close_matches(name, defined, n=1) for name in lacking}
    hints = [f"; rename {matches[0]} to {name}" for name, matches in similar.items() if matches]
    return f"{cls.__name__} does not define {' and '.join(lacking)}{''.join(hints)}{locate_class(cls)}"


def locate_error(error: BaseException) -> str:
    """Return the last line of the user's code that an error passed as ``FILE:LINE``; empty if it passed none.

    Args:
        error: an error with its traceback.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file, module = frame.f_code.co_filename, str(frame.f_globals.get("__name__"))
        is_package = module.startswith(("tokenprune.", "torch.", "transformers."))
        if not (is_package or file.startswith(("<frozen", "<string>", *LIBRARY_FOLDERS))):
            return format_place(file, line)
    return ""


def format_place(file: str, line: int) -> str:
    """Return ``FILE:LINE`` with a file in the working directory as a relative path."""
    path = Path(file)
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else file}:{line}"
