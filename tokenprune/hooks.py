"""Hooks that a deep copy or pickle of a model does not carry along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A hook that has no effect in a copy of the model.

    Args:
        function: the function of the hook.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the parts of a deep copy or pickle: a hook without effect, without the strategy."""
        return _inactive_hook, ()


def _inactive_hook() -> Callable[..., None]:
    """Return the hook of a copy of the model."""
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    """Leave a call of a copied model as it is."""
