"""Checks of tensors that can be deferred, so that the host does not wait for the device in every check.

A check such as "no score is NaN" is a tensor on the device. Outside of `defer_checks`, `raise_if` reads it and raises.
Inside the block, checks are stored, and the caller reads all of them together (`stack_failures`,
`raise_first_failure`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DeferredCheck:
    """A check that is not read from the device so far.

    Args:
        failed: whether the check failed, bool `[]`; `[images]` for images that are reduced together.
        message: the text of the error.
    """

    failed: Tensor
    message: str


_DEFERRED: ContextVar[list[DeferredCheck] | None] = ContextVar("deferred_checks", default=None)


def raise_if(failed: Tensor, message: str) -> None:
    """Raise an error if a check failed; inside `defer_checks`, store the check instead.

    A graph of ``torch.compile`` contains no checks.

    Args:
        failed: whether the check failed, bool `[]`.
        message: the text of the error.

    Raises:
        ValueError: if the check failed, and no block defers checks.
    """
    if torch.compiler.is_compiling():
        return
    checks = _DEFERRED.get()
    if checks is not None:
        checks.append(DeferredCheck(failed, message))
    elif bool(failed):
        raise ValueError(message)


@contextmanager
def defer_checks() -> Iterator[list[DeferredCheck]]:
    """Store the checks inside the block instead of reading them; yields the list of stored checks."""
    checks: list[DeferredCheck] = []
    token = _DEFERRED.set(checks)
    try:
        yield checks
    finally:
        _DEFERRED.reset(token)


def stack_failures(checks: Sequence[DeferredCheck], device: torch.device) -> Tensor:
    """Return whether each check failed as one tensor, int64 `[checks]`.

    Args:
        checks: the checks.
        device: the device of the result.
    """
    if not checks:
        return torch.zeros(0, dtype=torch.long, device=device)
    return torch.stack([check.failed for check in checks]).long()


def raise_first_failure(checks: Sequence[DeferredCheck], failed: Sequence[int]) -> None:
    """Raise the error of the first failed check.

    Args:
        checks: the checks.
        failed: for each check, 1 if it failed.

    Raises:
        ValueError: if a check failed.
    """
    for check, has_failed in zip(checks, failed, strict=True):
        if has_failed:
            raise ValueError(check.message)
