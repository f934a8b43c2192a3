"""Faults in the result of a strategy, which are found on the device and raised where the host reads it.

A check such as "no score is NaN" computes one flag on the device. To read each flag at once would make the host wait
for the device in every check. Inside `collect_faults` the flags are collected, and the caller reads all of them at
once; outside, a fault raises immediately.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fault:
    """The result of one check.

    Args:
        flag: whether the check failed, bool `[]`; `[images]` for images that are reduced together.
        message: the text of the error.
    """

    flag: Tensor
    message: str


_COLLECTED: ContextVar[list[Fault] | None] = ContextVar("collected_faults", default=None)


def report_fault(flag: Tensor, message: str) -> None:
    """Raise an error if a check failed; inside `collect_faults`, store the check instead.

    A graph of ``torch.compile`` contains no checks.

    Args:
        flag: whether the check failed, bool `[]`.
        message: the text of the error.

    Raises:
        ValueError: if the flag is true, and no block collects faults.
    """
    if torch.compiler.is_compiling():
        return  # a compiled graph has no checks
    faults = _COLLECTED.get()
    if faults is not None:
        faults.append(Fault(flag, message))
    elif bool(flag):
        raise ValueError(message)


@contextmanager
def collect_faults() -> Iterator[list[Fault]]:
    """Collect the checks inside the block, and yield the list of them."""
    faults: list[Fault] = []
    token = _COLLECTED.set(faults)
    try:
        yield faults
    finally:
        _COLLECTED.reset(token)


def stack_flags(faults: Sequence[Fault], device: torch.device) -> Tensor:
    """Return the flags of all checks as one tensor, int64 `[faults]`.

    Args:
        faults: the checks.
        device: the device of the result.
    """
    if not faults:
        return torch.zeros(0, dtype=torch.long, device=device)
    return torch.stack([fault.flag for fault in faults]).long()


def raise_first(faults: Sequence[Fault], failed: Sequence[int]) -> None:
    """Raise the error of the first failed check.

    Args:
        faults: the checks.
        failed: for each check, 1 if it failed.

    Raises:
        ValueError: if a check failed.
    """
    for fault, has_failed in zip(faults, failed, strict=True):
        if has_failed:
            raise ValueError(fault.message)
