"""Narrow cache layers: they store the entries that remain and report the length of the whole sequence.

Masks and positions are then always built for the whole sequence, whichever layer transformers reads their sizes from.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from tokenprune.decoder.placement import Placement


def find_cache_layer(cache: Any, index: int, creates: bool = False) -> Any:
    """Return a layer of a cache; None if it does not exist or stores no keys.

    Args:
        cache: the cache; None without a cache.
        index: index of the layer in the cache.
        creates: whether a cache that grows by layers creates the layer.
    """
    if cache is None:
        return None
    while creates and len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index] if index < len(cache.layers) else None
    return layer if isinstance(layer, CacheLayerMixin) else None


def is_narrow(layer: Any) -> bool:
    """Return whether a cache layer is narrow."""
    return getattr(layer, "placement", None) is not None


def make_narrow(layer: Any, placement: Placement) -> None:
    """Make a cache layer narrow, before it stores the entries of a forward pass.

    Args:
        layer: the cache layer; its class becomes a subclass of its class.
        placement: the places of its entries after the forward pass.
    """
    if not hasattr(layer, "base_class"):
        kind: Any = type(layer)
        layer.__class__ = narrow_class(kind)
        layer.placement, layer.dropped = None, 0
    layer.place(placement)


@cache
def narrow_class(base: Any) -> Any:
    """Return the narrow subclass of a class of cache layers.

    Args:
        base: the class; a mixin in front of it would change the layout of its objects.
    """
    if issubclass(base, StaticSlidingWindowLayer):
        members = _STATIC_SLIDING
    elif issubclass(base, DynamicSlidingWindowLayer):
        members = _SLIDING
    elif issubclass(base, StaticLayer):
        members = _STATIC
    else:
        members = {}
    return type(f"Narrow{base.__name__}", (base,), {**_members(base), **{n: f(base) for n, f in members.items()}})


def _rebuild(base: Any) -> Any:
    """Return an empty narrow layer, for copies and pickles."""
    kind = narrow_class(base)
    return kind.__new__(kind)


def _members(base: Any) -> dict[str, Any]:
    """Return the attributes and methods that all narrow subclasses have."""

    def place(self: Any, placement: Placement) -> None:
        """Set the places of the entries."""
        self.placement, self.dropped = placement, placement.dropped

    def get_seq_length(self: Any) -> Any:
        """Return the length of the whole sequence."""
        return base.get_seq_length(self) + self.dropped

    def count_stored(self: Any) -> int:
        """Return the number of entries so far."""
        return int(base.get_seq_length(self))

    def given_entries(self: Any, new: int) -> tuple[int, int]:
        """Return the range of entries that the kernel receives in a forward pass with new entries."""
        return 0, self.count_stored() + new

    def crop(self: Any, length: int) -> None:
        """Remove entries from the end; a positive length is the length of the sequence that remains."""
        dropped, self.dropped = self.dropped, 0
        base.crop(self, length - dropped if length > 0 else length)
        self.dropped = dropped

    def reset(self: Any) -> None:
        """Empty the layer and restore its class."""
        self.__class__ = base
        del self.placement, self.dropped
        self.reset()

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        """Reorder the rows."""
        base.reorder_cache(self, beam_idx)
        self.placement = self.placement.take_rows(beam_idx)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        """Repeat each row."""
        base.batch_repeat_interleave(self, repeats)
        rows = torch.arange(len(self.placement.slots), device=self.placement.slots.device)
        self.placement = self.placement.take_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        """Keep the rows with these indices."""
        base.batch_select_indices(self, indices)
        self.placement = self.placement.take_rows(indices)

    def reduce(self: Any) -> tuple[Any, ...]:
        """Return the parts of a pickle: the class is not importable by name."""
        return _rebuild, (base,), vars(self).copy()

    return {
        "__module__": __name__,
        "__doc__": f"A narrow `{base.__name__}`.",
        "_layer_type": None,  # transformers registers subclasses that have one
        "base_class": base,
        "place": place,
        "get_seq_length": get_seq_length,
        "count_stored": count_stored,
        "given_entries": given_entries,
        "crop": crop,
        "reset": reset,
        "reorder_cache": reorder_cache,
        "batch_repeat_interleave": batch_repeat_interleave,
        "batch_select_indices": batch_select_indices,
        "__reduce__": reduce,
    }


def _sliding_place(base: Any) -> Any:
    def place(self: Any, placement: Placement) -> None:
        self.cumulative_length += placement.dropped - self.dropped
        self.placement, self.dropped = placement, placement.dropped

    return place


def _sliding_length(base: Any) -> Any:
    def get_seq_length(self: Any) -> int:
        return int(self.cumulative_length)  # of the whole sequence: `place` adds what is dropped

    return get_seq_length


def _sliding_stored(base: Any) -> Any:
    def count_stored(self: Any) -> int:
        return int(self.cumulative_length) - self.dropped

    return count_stored


def _sliding_entries(base: Any) -> Any:
    def given_entries(self: Any, new: int) -> tuple[int, int]:
        stop = self.count_stored() + new
        given = new + (self.keys.shape[-2] if self.is_initialized else 0)
        if self.record_past:
            given = min(given, self.sliding_window - 1 + new)
        return stop - given, stop

    return given_entries


def _sliding_crop(base: Any) -> Any:
    def crop(self: Any, length: int) -> None:
        total = self.cumulative_length
        base.crop(self, length)
        self.cumulative_length = min(total, length) if length > 0 else total - abs(length)

    return crop


def _static_entries(base: Any) -> Any:
    def given_entries(self: Any, new: int) -> tuple[int, int]:
        return 0, self.max_cache_len

    return given_entries


def _static_sliding_entries(base: Any) -> Any:
    def given_entries(self: Any, new: int) -> tuple[int, int]:
        stored, size = self.cumulative_length_int, self.max_cache_len
        if stored >= size:
            return stored + new - (size if new == 1 else size - 1 + new), stored + new
        return (0, stored + new) if stored + new > size else (0, size)

    return given_entries


def _static_sliding_sizes(base: Any) -> Any:
    def get_mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
        self.cumulative_length_int += self.dropped
        sizes: tuple[int, int] = base.get_mask_sizes(self, query_length)
        self.cumulative_length_int -= self.dropped
        return sizes

    return get_mask_sizes


_SLIDING = {
    "place": _sliding_place,
    "get_seq_length": _sliding_length,
    "count_stored": _sliding_stored,
    "given_entries": _sliding_entries,
    "crop": _sliding_crop,
}
_STATIC = {"given_entries": _static_entries}
_STATIC_SLIDING = {"given_entries": _static_sliding_entries, "get_mask_sizes": _static_sliding_sizes}
