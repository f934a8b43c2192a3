"""Cuts inside the LLM: the layer from which on visual tokens are missing, and the budget that remains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenprune.budget import Budget


class Cut(NamedTuple):
    """A layer of the LLM from which on dropped tokens are missing, and the number of tokens that remain.

    Args:
        layer: the first layer without the dropped tokens: an index, or a relative depth from 0.0 to 1.0.
        budget: the tokens of an image that remain; a ratio refers to the tokens that entered the LLM.
    """

    layer: int | float
    budget: int | float | str | Budget


def resolve_cut(layer: int | float, layers: int) -> int:
    """Return the index of the first layer without the dropped tokens.

    A relative depth is ``round(depth * layers)``, at least the second layer and at most the last: PyramidDrop's 0.75 of
    32 layers is layer 24.

    Args:
        layer: an index, or a relative depth from 0.0 to 1.0.
        layers: number of layers of the LLM.

    Raises:
        ValueError: if the cut lies before the second layer or after the last layer.
    """
    index = min(max(1, round(layer * layers)), layers - 1) if isinstance(layer, float) else layer
    if not 1 <= index < layers:
        raise ValueError(
            f"a cut at layer {layer!r} is not inside an LLM with {layers} layers; use a layer from 1 to {layers - 1}, "
            "or a relative depth (several cuts: schedule=[[1, 0.5]]). To drop tokens before the first layer, use a "
            "strategy of the projector stage"
        )
    return index


def resolve_cuts(cuts: Sequence[Cut], layers: int) -> dict[int, Cut]:
    """Return the cuts by the index of their first layer without the dropped tokens, in ascending order.

    Relative depths that are one layer of a shallow LLM are one cut, with the budget of the last of them.

    Args:
        cuts: the cuts of a strategy.
        layers: number of layers of the LLM.

    Raises:
        ValueError: if a cut is not inside the LLM, or if cuts do not ascend.
    """
    resolved: dict[int, Cut] = {}
    for cut in cuts:
        index, last = resolve_cut(cut.layer, layers), max(resolved, default=0)
        is_relative = index == last and isinstance(cut.layer, float) and isinstance(resolved[last].layer, float)
        if index <= last and not is_relative:
            raise ValueError(
                f"the cuts {[cut.layer for cut in cuts]} are layers {[*resolved, index]} of an LLM with {layers} "
                "layers; set cuts that ascend"
            )
        resolved[index] = cut
    return resolved


def as_entered_budget(value: int | float | str | Budget) -> Budget:
    """Return a budget; an amount becomes a budget of the tokens that entered the LLM.

    Args:
        value: a budget or an amount.
    """
    return value if isinstance(value, Budget) else Budget(value, of="entered")
