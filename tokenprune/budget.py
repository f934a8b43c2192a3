"""Budgets: the number of visual tokens that may enter the LLM, and its exact division among tiles."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from numbers import Integral, Real
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from tokenprune.geometry import TileGeometry
from tokenprune.literals import check_literal
from tokenprune.selection import count_modifications

BudgetUnit: TypeAlias = Literal["image", "tile"]
BudgetReference: TypeAlias = Literal["encoded", "unpadded", "entered"]
NewlineCost: TypeAlias = Literal["free", "counted"]
OPTIONS = {"per": get_args(BudgetUnit), "of": get_args(BudgetReference), "newlines": get_args(NewlineCost)}
"""Values of the options of a `Budget`. A compiled graph creates budgets, but cannot read them from annotations."""

PERCENT = re.compile(r"\s*(\d{1,3}\.?\d*|\.\d+)\s*%\s*")
"""A ratio as text: ``"20%"``, ``"12.5 %"``."""

MAX_DENOMINATOR = 10**6
"""Largest denominator of a ratio as a fraction. It exceeds the number of tokens of any image, so ``157 / 2880`` is
exact, and it is far coarser than a float, so ``1 - 0.9`` is 1/10."""


class OneTokenWarning(UserWarning):
    """A budget is the count 1, to which W&B's server also converts the ratio 1.0."""


class UnreachableBudgetWarning(UserWarning):
    """A strategy cannot reach its budget, and keeps more."""


class NoTokenWarning(UserWarning):
    """A budget grants no visual token of an image, so the model answers without the image."""


@dataclass(frozen=True)
class Budget:
    """The number of visual tokens of an image that may enter the LLM.

    The options cover every definition of a budget in the literature. ``Budget(0.2)`` is the definition of HiRED: 20 %
    of tiles x tokens.

    Args:
        amount: a float from 0.0 to 1.0 or a text such as ``"20%"`` is a ratio, an int is a number of tokens. Numpy
            numbers and fractions are accepted.
        per: ``"image"``, or ``"tile"`` to grant the amount once for each tile; the allocation still divides the sum.
        of: the reference of a ratio: all ``"encoded"`` tokens, the tokens of the model's ``"unpadded"`` layout, or the
            tokens that ``"entered"`` the LLM, which is the default of strategies that act inside the LLM.
        newlines: newline tokens are ``"free"``, or ``"counted"`` as tokens (also in the reference of a ratio).
    """

    amount: int | float | str
    per: BudgetUnit = "image"
    of: BudgetReference = "encoded"
    newlines: NewlineCost = "free"

    def __post_init__(self) -> None:
        """Raise a `ValueError` if the amount is neither a ratio nor a count, or if an option is not known."""
        parse_amount(self.amount)
        for name, allowed in OPTIONS.items():
            check_literal(f"budget {name}", getattr(self, name), allowed)

    @property
    def number(self) -> int | float:
        """The amount as a Python number: a float is a ratio, an int is a count."""
        return parse_amount(self.amount)

    def asked(self, geometry: TileGeometry) -> int:
        """Return the number of tokens that this budget grants an image.

        A ratio is converted to the nearest simple fraction and rounded down exactly. In floats, ``int(100 * 0.29)`` is
        28 and ``int(500 * (1 - 0.9))`` is 49.

        Args:
            geometry: the layout of the image.
        """
        number = self.number
        if isinstance(number, int):
            return number * (geometry.tiles if self.per == "tile" else 1)
        ratio = Fraction(number).limit_denominator(MAX_DENOMINATOR)
        geometry = geometry.entered_layout if self.of == "entered" else geometry.encoded_layout
        per_tile = [geometry.tokens] * geometry.tiles if self.of == "encoded" else geometry.valid_per_tile
        newlines = geometry.newlines if self.newlines == "counted" else 0
        if self.per == "tile":
            return sum(int(ratio * tokens) for tokens in per_tile) + int(ratio * newlines)
        return int(ratio * (sum(per_tile) + newlines))


def parse_amount(amount: object) -> int | float:
    """Return an amount as a Python number: a ratio as a float from 0.0 to 1.0, a count as an int.

    Args:
        amount: a whole number (count), another real number (ratio), or a text such as ``"20%"`` (ratio).

    Raises:
        ValueError: if the amount is neither a ratio nor a count.
    """
    percent = PERCENT.fullmatch(amount) if isinstance(amount, str) else None
    value = amount if percent is None else Fraction(percent[1]) / 100
    if isinstance(value, Real) and not isinstance(amount, bool):
        number = int(value) if isinstance(value, Integral) else float(value)
        if number >= 0 and (isinstance(number, int) or number <= 1):
            return number
    raise ValueError(
        f"budget {amount!r} is neither a ratio nor a count; write a float from 0.0 to 1.0 or a percentage for a ratio "
        'of the tokens (0.2 and "20%" are the same), or an int for a number of tokens (160); take .item() of a tensor'
    )


def format_budget(budget: object) -> str:
    """Return a budget as text: ``"20%"``, ``"160 tokens"``, ``"20% per tile of unpadded tokens"``.

    Args:
        budget: a budget, an amount, or a text, which is returned unchanged.
    """
    if isinstance(budget, str):
        return budget
    options = budget if isinstance(budget, Budget) else Budget(parse_amount(budget))
    number = options.number
    text = f"{number} tokens" if isinstance(number, int) else f"{100 * number:.6g}%"
    text += " per tile" if options.per == "tile" else ""
    text += f" of {options.of} tokens" if options.of == "unpadded" else ""
    return text + (" with newline tokens" if options.newlines == "counted" else "")


def parse_ratio(amount: float | str) -> float:
    """Return a ratio as a float, for options that accept no count.

    Args:
        amount: a number from 0 to 1, or a text such as ``"20%"``.

    Raises:
        ValueError: if the amount is not a ratio.
    """
    return float(parse_amount(amount if isinstance(amount, str) else float(amount)))


def check_share(name: str, value: float) -> None:
    """Check that an option is a share.

    Args:
        name: name of the option.
        value: its value.

    Raises:
        ValueError: if the value is not from 0 to 1.
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r} must be from 0.0 to 1.0")


def as_budget(value: Budget | float | int | str) -> Budget:
    """Return a budget whose amount is a Python number; an amount becomes a `Budget` with default options.

    Args:
        value: a budget or an amount.

    Raises:
        ValueError: if the amount is neither a ratio nor a count.
    """
    budget = value if isinstance(value, Budget) else Budget(value)
    return budget if type(budget.amount) in (int, float) else replace(budget, amount=budget.number)


def normalize_budget(value: Budget | float | int | str) -> Budget | float | int:
    """Return a budget in the form of a configuration: a Python number, or a `Budget` whose amount is one.

    A count of 1 raises a `OneTokenWarning`: W&B's server silently converts the ratio 1.0 to 1, which keeps one token.

    Args:
        value: a budget or an amount.

    Raises:
        ValueError: if the amount is neither a ratio nor a count.
    """
    budget = as_budget(value)
    if budget.amount == 1 and isinstance(budget.amount, int):
        warnings.warn(
            f"a budget of 1 keeps one token per {budget.per}; to keep all tokens, write 1.0 or '100%' (in sweeps "
            "only '100%': W&B turns 1.0 into 1)",
            OneTokenWarning,
            stacklevel=4,
        )
    return budget if isinstance(value, Budget) else budget.number


def apportion(total: int, weights: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Divide ``total`` units over parts in proportion to ``weights``, at most ``capacity`` each.

    Largest remainder method (Hamilton) with spill-over: units beyond the capacity of a part go to the parts with room,
    in proportion to their weights. Parts of weight zero receive units only if all parts with a weight are full. Ties
    go to the lower index.

    Args:
        total: units to divide; units beyond the sum of the capacities are dropped.
        weights: non-negative weight of each part.
        capacity: maximum units of each part.

    Returns:
        Units per part; they sum to ``min(total, sum(capacity))``.

    Raises:
        ValueError: if the lengths differ, or if a number is negative or not finite.
    """
    if len(weights) != len(capacity):
        raise ValueError(
            f"{len(weights)} weights but {len(capacity)} capacities; pass one weight and one capacity per part"
        )
    if total < 0 or any(room < 0 for room in capacity) or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(
            f"total {total}, weights {list(weights)} and capacity {list(capacity)} must be finite and >= 0"
        )
    share = [0] * len(weights)
    exact = [Fraction(weight) for weight in weights]
    left = min(total, sum(capacity))
    while left > 0:
        open_parts = [part for part in range(len(share)) if share[part] < capacity[part]]
        weighted = [part for part in open_parts if exact[part] > 0]
        if not weighted:  # only parts of weight zero have room: fill them in proportion to their room
            exact = [Fraction(room) for room in capacity]
            continue
        weight_sum = sum(exact[part] for part in weighted)
        quota = {part: left * exact[part] / weight_sum for part in weighted}
        overfull = [part for part in weighted if quota[part] >= capacity[part] - share[part]]
        if overfull:
            for part in overfull:
                left -= capacity[part] - share[part]
                share[part] = capacity[part]
            continue
        for part in weighted:
            share[part] += int(quota[part])
        left -= sum(int(value) for value in quota.values())
        by_remainder = sorted(weighted, key=lambda part: (-(quota[part] - int(quota[part])), part))
        for part in by_remainder[:left]:
            share[part] += 1
        left = 0
    return share


def apportion_tensor(total: int, weights: Tensor, capacity: Sequence[int]) -> Tensor:
    """Divide units over parts as `apportion` does, without reading from the device, int64 `[parts]`.

    Part i gets ``min(capacity_i, level * weight_i)`` before rounding. If parts are filled in the order of ``capacity /
    weight`` and the first k are full, the others need the level ``(total - their capacities) / (remaining weights)``;
    the right level is the largest of these. The arithmetic is float64 instead of exact fractions. Remainders that
    differ by less than 1e-9 count as equal, and weights below 1e-200 of the largest weight count as zero.

    Args:
        total: units to divide; units beyond the sum of the capacities are dropped.
        weights: non-negative weight of each part, `[parts]`.
        capacity: maximum units of each part.

    Returns:
        Units per part, int64 `[parts]`.
    """
    total, limit = min(total, sum(capacity)), as_device_tensor(tuple(capacity), weights.device)
    real_limit = limit.double()
    weights = weights.double() * as_device_tensor(tuple(int(units > 0) for units in capacity), weights.device)
    weights = weights / weights.amax().clamp(min=torch.finfo(torch.float64).tiny)
    # Parts of weight zero share by capacity, after all other parts are full.
    weights = torch.add(weights, real_limit, alpha=1e-200) + 1e-260
    order = (real_limit / weights).argsort(stable=True)
    limit_in_order, weight_in_order = real_limit[order], weights[order]
    units_left = total - (limit_in_order.cumsum(dim=0) - limit_in_order)
    weight_left = weight_in_order.flip(0).cumsum(dim=0).flip(0)
    quota = torch.minimum(weights * (units_left / weight_left).amax(), real_limit)
    floor = quota.floor()
    remainder = ((quota - floor) * 1e9).round()
    rank = remainder.argsort(descending=True, stable=True).argsort()
    return (floor + (rank < total - floor.sum())).long().minimum(limit)


def copy_to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Return numbers as a new tensor, `[values]`; whole numbers that occurred before are not copied from the host.

    Args:
        values: the numbers; `read_numbers` returns whole numbers without reading from the device.
        device: the device of the tensor.
    """
    if not all(isinstance(value, int) for value in values):
        return torch.tensor(values, device=device)
    with torch.inference_mode(False):  # an inference tensor does not count its modifications
        tensor = as_device_tensor(tuple(int(value) for value in values), device).clone()
    tensor.host_values, tensor.host_version = tuple(values), count_modifications(tensor)  # type: ignore[attr-defined]
    return tensor


def as_device_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return whole numbers as a cached tensor, int64 `[values]`; equal arguments return the same tensor.

    These calls return the same tensor; do not modify it. A compiled graph fills the tensor on the device, because a
    copy from the host cannot be part of a CUDA graph.

    Args:
        values: the numbers.
        device: the device of the tensor.
    """
    if torch.compiler.is_compiling():
        return torch.cat([torch.full((1,), value, dtype=torch.long, device=device) for value in values])
    return _cache_tensor(values, device)


@lru_cache(maxsize=1024)
def _cache_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may record gradients
        return torch.tensor(values, dtype=torch.long, device=device)


def read_numbers(tensor: Tensor) -> list[int]:
    """Return the numbers of a tensor; nothing is read from the device if `copy_to_device` built it.

    Args:
        tensor: whole numbers, `[values]`.
    """
    values = getattr(tensor, "host_values", None)
    is_modified = values is not None and tensor.host_version != count_modifications(tensor)  # type: ignore[attr-defined]
    return tensor.tolist() if values is None or is_modified else list(values)
