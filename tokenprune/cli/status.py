"""Shows in a terminal what a command does while it prints nothing."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_status(text: str) -> Iterator[Callable[[str], None]]:
    """Show a text with a moving symbol on stderr during the block; nothing if stderr is no terminal.

    Yields a function that appends the current step to the text.

    Print results after the block: inside it, they would be written to stderr.

    Args:
        text: the action, such as ``"loading"``.
    """
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as status:
        yield lambda step: status.update(f"{text}: {step}")


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Collect no garbage inside the block. Importing torch and transformers is then a fifth faster."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def print_short_warnings() -> Iterator[None]:
    """Print each warning of tokenprune inside the block once, as one line and without a line of source code."""
    original, printed = warnings.formatwarning, set[str]()

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if not category.__module__.startswith("tokenprune."):
            return original(message, category, filename, lineno, line)
        if str(message) in printed:  # libraries reset the filter of Python that shows a warning once
            return ""
        printed.add(str(message))
        return f"tokenprune: {message}\n"

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = original


@contextmanager
def hide_transformers_warnings() -> Iterator[None]:
    """Print only errors of transformers inside the block; its warnings about example models concern no user."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
