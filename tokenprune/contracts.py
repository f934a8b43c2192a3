"""Checks of the values that methods of strategies and components return.

The errors name class and method, the expected and the returned value, and file and line of the user's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenprune.checks import raise_if
from tokenprune.image import Signal
from tokenprune.source_code import format_place, locate_class

DTYPE_KINDS = {"bool": "bool mask", "real": "tensor"}
"""The tensors that a method must return, in words, by kind of dtype."""


def locate_method(instance: object, method: str) -> str:
    """Return the file and line of a method as `` (FILE:LINE)``; empty for code of the library and in compiled graphs.

    Args:
        instance: the strategy or component.
        method: name of a method, property or class attribute.
    """
    if torch.compiler.is_compiling():
        return ""
    cls = type(instance)
    member: Any = inspect.getattr_static(cls, method)
    function: Any = member.fget if isinstance(member, property) else member
    owner = next(base for base in cls.__mro__ if method in vars(base))
    if owner.__module__.startswith("tokenprune."):
        return ""
    if inspect.isfunction(function):
        code = inspect.unwrap(function).__code__
        return f" ({format_place(code.co_filename, code.co_firstlineno)})"
    return locate_class(owner)


def describe_value(value: object) -> str:
    """Return the type of a value; for a tensor, its dtype and shape.

    Args:
        value: the value.
    """
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def require_tensor(
    value: Any,
    instance: object,
    method: str,
    axes: str,
    shape: Sequence[int],
    kind: Literal["bool", "real"],
    device: torch.device | None = None,
) -> Tensor:
    """Return the result of a method if it is the expected tensor.

    Only the type, the dtype, the shape and the device are read, which does not wait for the device.

    Args:
        value: the result.
        instance: the strategy or component.
        method: name of the method.
        axes: names of the dimensions, such as ``"[tiles, tokens]"``.
        shape: the expected shape.
        kind: the expected kind of dtype.
        device: the expected device; None accepts every device.

    Raises:
        TypeError: if the result is no tensor.
        ValueError: if shape, dtype or device are not as expected.
    """
    is_tensor = isinstance(value, Tensor)
    if is_tensor and tuple(value.shape) == tuple(shape) and _has_kind(value.dtype, kind):
        if device is None or value.device == device:
            return value
        fault = f"{describe_value(value)} on {value.device} instead of {device}"
    else:
        fault = describe_value(value)
    error = ValueError if is_tensor else TypeError
    raise error(
        f"{type(instance).__name__}.{method} must return a {DTYPE_KINDS[kind]} {axes} = {list(shape)}, not {fault}"
        f"{locate_method(instance, method)}"
    )


def _has_kind(dtype: torch.dtype, kind: str) -> bool:
    """Return whether a dtype is of a kind; bool and whole numbers are real numbers, too."""
    return dtype == torch.bool if kind == "bool" else not dtype.is_complex


def require_allocation(granted: Any, policy: object, tiles: int) -> Sequence[int] | Tensor:
    """Return the result of an allocation if it is a number of tokens for each tile.

    The values of a tensor are not read from the device: inside `defer_checks`, a negative entry raises later.

    Args:
        granted: the result of `allocate`.
        policy: the allocation.
        tiles: number of tiles.

    Raises:
        TypeError: if the result is neither a sequence nor a tensor.
        ValueError: if it has another length, or an entry is negative or no number.
    """
    if isinstance(granted, Tensor):
        value = require_tensor(granted, policy, "allocate", "[tiles]", (tiles,), "real")
        raise_if(
            ~(value >= 0).all(),
            f"{type(policy).__name__}.allocate returned a negative number of tokens or NaN; a signal that it reads can "
            "contain NaN or infinite values",
        )
        return value
    expected = f"{type(policy).__name__}.allocate must return {tiles} numbers of tokens [tiles]"
    if not isinstance(granted, Sequence | np.ndarray) or isinstance(granted, str):
        raise TypeError(f"{expected}, not {describe_value(granted)}{locate_method(policy, 'allocate')}")
    if len(granted) != tiles or not all(isinstance(number, Real) and float(number) >= 0 for number in granted):
        raise ValueError(f"{expected}, not {list(granted)}{locate_method(policy, 'allocate')}")
    return granted if isinstance(granted, Sequence) else list(granted)


def require_count(value: Any, instance: object, method: str, meaning: str) -> None:
    """Check that a number of tokens in the result of a method is a whole number or a tensor, which is not read.

    Args:
        value: the number.
        instance: the strategy or component.
        method: name of the method.
        meaning: the meaning of the number, for the error.

    Raises:
        TypeError: if the value is neither.
    """
    if not isinstance(value, Integral | Tensor):
        raise TypeError(
            f"{type(instance).__name__}.{method} must return {meaning} as a whole number, not {describe_value(value)}"
            f"{locate_method(instance, method)}"
        )


def require_grid(grid: Any, instance: object, method: str) -> tuple[int, int] | None:
    """Return the result of a method if it is a height and a width, or None.

    Args:
        grid: the result.
        instance: the strategy.
        method: name of the method.

    Raises:
        TypeError: if the result is neither.
    """
    if grid is None:
        return None
    if not isinstance(grid, Sequence) or [isinstance(side, Integral) for side in grid] != [True, True]:
        raise TypeError(
            f"{type(instance).__name__}.{method} must return (height, width) or None, not {grid!r:.80}"
            f"{locate_method(instance, method)}"
        )
    return int(grid[0]), int(grid[1])


def check_needs(instance: Any) -> None:
    """Check that the `needs` of a strategy or component are signals.

    If `needs` reads an attribute that a subclass sets later, nothing is checked. Attaching checks again.

    Args:
        instance: the strategy or component.

    Raises:
        TypeError: if `needs` is no sequence of signals.
    """
    try:
        needs = instance.needs
    except AttributeError:
        return
    is_sequence = isinstance(needs, Sequence) and not isinstance(needs, str | Signal)
    wrong = [need for need in needs if not isinstance(need, Signal)] if is_sequence else [needs]
    if wrong or not is_sequence:
        fault = "a method; decorate it with @property" if callable(needs) else repr(wrong[0])
        raise TypeError(
            f"{type(instance).__name__}.needs must be a sequence of signals, such as "
            f'(Signal("cls_attention", "feature"),), not {fault}{locate_method(instance, "needs")}'
        )
