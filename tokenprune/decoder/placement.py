"""Pure functions for narrow layers: the entries that remain, their places in the sequence, and their masks.

The *sequence* is the whole prompt with all generated tokens. A *narrow* layer runs on *entries*: the positions that
remain. Rows with fewer entries than the longest row start with fillers, which repeat their first entry and are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Kernel: TypeAlias = Literal["bool", "float", "flash"]
"""The form of attention masks: bool or float `[rows, 1, queries, keys]`, or bool `[rows, keys]` of flash kernels."""


@dataclass(frozen=True, eq=False)
class Entries:
    """The positions of one forward pass that remain in a narrow layer.

    Args:
        index: the position of each entry in the input of the layer, `[rows, width]`.
        is_filler: the fillers, bool `[rows, width]`; None if no row has fillers.
        source: the entry that each position shows, which is the last entry at or before it, `[rows, length]`.
        dropped: number of real positions of each row that have no entry, `[rows]`.
    """

    index: Tensor
    is_filler: Tensor | None
    source: Tensor
    dropped: Tensor

    @classmethod
    def from_mask(cls, remains: Tensor, is_real: Tensor, width: int, has_fillers: bool) -> Entries:
        """Return the entries of the positions that remain, without reading from the device.

        Args:
            remains: the positions that remain, bool `[rows, length]`; at least one in each row.
            is_real: the positions that are not padding, bool `[rows, length]`.
            width: number of entries of the longest row.
            has_fillers: whether a row has fewer entries.
        """
        counts = remains.sum(dim=1, keepdim=True)
        order = remains.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        spare = width - counts
        rank = torch.arange(width, device=remains.device) - spare
        index = order.gather(1, rank.clamp(min=0))
        source = (remains.long().cumsum(dim=1) - 1).clamp(min=0) + spare
        return cls(index, rank < 0 if has_fillers else None, source, is_real.sum(dim=1) - counts[:, 0])

    @property
    def width(self) -> int:
        """Number of entries of each row, fillers included."""
        return self.index.shape[1]

    def repeat(self, times: int) -> Entries:
        """Return the entries with each row repeated.

        Args:
            times: number of repetitions; 1 returns the same object.
        """
        if times == 1:
            return self
        index, source, dropped = (v.repeat_interleave(times, dim=0) for v in (self.index, self.source, self.dropped))
        fillers = None if self.is_filler is None else self.is_filler.repeat_interleave(times, dim=0)
        return Entries(index, fillers, source, dropped)

    def take(self, value: Tensor) -> Tensor:
        """Return the entries of hidden states, `[rows, width, dim]`.

        Args:
            value: hidden states, `[rows, length, dim]`.
        """
        return value.gather(1, self.index[..., None].expand(*self.index.shape, value.shape[-1]))

    def expand(self, value: Tensor) -> Tensor:
        """Return hidden states at the width of the input, `[rows, length, dim]`.

        A position without an entry shows the state of the last entry at or before it.

        Args:
            value: hidden states of the entries, `[rows, width, dim]`.
        """
        return value.gather(1, self.source[..., None].expand(*self.source.shape, value.shape[-1]))

    def take_rotary(self, value: Tensor) -> Tensor:
        """Return position embeddings of the entries, `[..., rows, width, dim]`.

        Args:
            value: position embeddings, `[..., 1 or rows, length, dim]`, real or complex.
        """
        value = value[None] if value.dim() == 2 else value
        index = self.index[..., None].expand(*value.shape[:-3], *self.index.shape, value.shape[-1])
        return value.expand(*value.shape[:-3], len(self.index), *value.shape[-2:]).gather(-2, index)

    def take_ids(self, value: Tensor) -> Tensor:
        """Return position ids of the entries, `[..., rows, width]`.

        Args:
            value: position ids, `[..., 1 or rows, length]`.
        """
        index = self.index.expand(*value.shape[:-2], *self.index.shape)
        return value.expand(*value.shape[:-2], len(self.index), value.shape[-1]).gather(-1, index)


@dataclass(eq=False)
class Placement:
    """The places in the sequence of the entries that a narrow cache layer stores.

    Entry ``m`` of the first ``n = slots.shape[1]`` entries has the place ``slots[:, m]``. Later entries follow one
    another at ``m + dropped``. No decode step therefore updates a placement.

    Args:
        slots: the place of each of the first entries, `[rows, n]`.
        is_filler: the fillers, bool `[rows, n]`; None if no row has fillers.
        dropped: difference between the lengths of the sequence and of the entries.
        removed: number of real positions of each row that have no entry, `[rows]`.
    """

    slots: Tensor
    is_filler: Tensor | None
    dropped: int
    removed: Tensor

    def __post_init__(self) -> None:
        """Prepare the memory of the last selection of rows: all layers of a cut are reordered by one index."""
        self._last: tuple[Tensor, Placement] | None = None

    @classmethod
    def extended(cls, placement: Placement | None, entries: Entries, past: int, length: int) -> Placement:
        """Return the placement after a forward pass with its own entries.

        Args:
            placement: the placement of the stored entries; None if nothing was dropped before.
            entries: the new entries.
            past: length of the sequence before the forward pass.
            length: number of positions of the forward pass.
        """
        rows, new = len(entries.index), entries.index + past
        dropped = length - entries.width
        if not past:
            return cls(new, entries.is_filler, dropped, entries.dropped)
        before = cls(new[:, :0], None, 0, entries.dropped * 0) if placement is None else placement
        stored = past - before.dropped
        fillers = None
        if before.is_filler is not None or entries.is_filler is not None:
            hidden = new.new_zeros(rows, entries.width, dtype=torch.bool)
            hidden = hidden if entries.is_filler is None else entries.is_filler
            old = before.fillers(0, stored)
            fillers = torch.cat([hidden.new_zeros(rows, stored) if old is None else old, hidden], dim=1)
        slots = torch.cat([before.places(0, stored), new], dim=1)
        return cls(slots, fillers, before.dropped + dropped, before.removed + entries.dropped)

    def places(self, start: int, stop: int) -> Tensor:
        """Return the places of a range of entries, `[rows, stop - start]`."""
        rows, count = self.slots.shape
        if stop <= count:
            return self.slots[:, start:stop]
        later = torch.arange(max(start, count), stop, device=self.slots.device) + self.dropped
        return torch.cat([self.slots[:, start:], later.expand(rows, -1)], dim=1)

    def fillers(self, start: int, stop: int) -> Tensor | None:
        """Return the fillers of a range of entries, bool `[rows, stop - start]`; None without fillers."""
        if self.is_filler is None:
            return None
        rows, count = self.slots.shape
        if stop <= count:
            return self.is_filler[:, start:stop]
        later = self.is_filler.new_zeros(rows, stop - max(start, count))
        return torch.cat([self.is_filler[:, start:], later], dim=1)

    def take_rows(self, index: Tensor) -> Placement:
        """Return the placement of selected rows; a call with the same index returns the same object.

        Args:
            index: row numbers, `[rows]`.
        """
        if self._last is None or self._last[0] is not index:
            rows = index.to(self.slots.device)
            fillers = None if self.is_filler is None else self.is_filler[rows]
            self._last = index, Placement(self.slots[rows], fillers, self.dropped, self.removed[rows])
        return self._last[1]


def narrow_mask(
    mask: Tensor | None,
    queries: Tensor | None,
    key_places: Tensor,
    fillers: Tensor | None,
    kernel: Kernel,
    query_places: Tensor | None = None,
    offset: int = 0,
    is_complete: bool = True,
) -> Tensor | None:
    """Return the attention mask of a narrow layer, gathered from the mask of the sequence.

    Args:
        mask: the mask of the sequence: bool or float `[rows or 1, heads or 1, queries, keys]`, or `[rows, keys]`; None
            if every query sees the keys at or before it.
        queries: the row of the mask of each query, `[rows, queries]`; None if they are the same.
        key_places: the place of each key in the sequence, `[rows, keys]`.
        fillers: the keys that are fillers, bool `[rows, keys]`; None without fillers.
        kernel: the form of a new mask.
        query_places: the place of each query in the sequence, `[rows, queries]`; read only without a mask.
        offset: the place of the first key of the mask.
        is_complete: whether every key has a column in the mask.
    """
    if mask is None:
        if fillers is None or query_places is None:
            return None
        if kernel == "flash":
            return ~fillers
        allowed = (key_places[:, None, :] <= query_places[..., None]) & ~fillers[:, None, :]
        return allowed[:, None] if kernel == "bool" else _as_float(allowed[:, None])
    columns, hidden = key_places - offset, fillers
    if not is_complete:
        outside = (columns < 0) | (columns >= mask.shape[-1])
        hidden = outside if hidden is None else hidden | outside
        columns = columns.clamp(0, mask.shape[-1] - 1)
    if mask.dim() == 2:
        taken = mask.expand(len(columns), -1).gather(1, columns)
        return taken if hidden is None else taken.masked_fill(hidden, 0)
    row = torch.arange(len(columns), device=columns.device)[:, None, None]
    mask = mask.expand(len(columns), *mask.shape[1:])
    if queries is None:
        index = columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
        taken = mask.gather(3, index)
    else:  # one gather along both dimensions: the intermediate result would be as large as the mask
        taken = mask.movedim(1, 3)[row, queries[..., None], columns[:, None, :]].movedim(3, 1)
    if hidden is None:
        return taken
    value = False if taken.dtype == torch.bool else torch.finfo(taken.dtype).min
    return taken.masked_fill(hidden[:, None, None, :], value)


def _as_float(allowed: Tensor) -> Tensor:
    dtype = torch.get_default_dtype()
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
