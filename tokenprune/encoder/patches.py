"""The patches of a vision tower that remain at a layer, and the groups into which they were merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.encoder.restoration import DroppedPatches, list_dropped, restore_dropped


class PatchGroups(NamedTuple):
    """The patches of each tile that remain after a step, and the patches that are merged into them.

    Args:
        kept: index of each remaining patch among the patches before the step, in the new order of the sequence,
            `[tiles, kept]`.
        group: for merging methods, the number in `kept` into which each patch is merged, `[tiles, patches]`; -1 for a
            dropped patch. A patch in `kept` is in its own group. None drops all patches that are not in `kept`.
        weights: weight of each patch in the sum of its group, `[tiles, patches]`. None averages a group; a patch that
            represents several patches then counts as often.
        neighbors: for methods that restore dropped patches, the numbers in `kept` of the patches whose changes are
            added to each dropped patch, in ascending order of the dropped patches, `[tiles, dropped, neighbors]`; -1 if
            a patch has fewer neighbors.
    """

    kept: Tensor
    group: Tensor | None = None
    weights: Tensor | None = None
    neighbors: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PatchRecord:
    """The patches of a call that remained in the vision tower.

    Args:
        kept: the visual tokens of each image whose patches remain, bool `[tiles, tokens]`; None if all tokens remain,
            because tokens consist of several patches, or because dropped patches were restored, and no token was
            dropped before the tower.
        patches_full: patches without reduction, summed over tiles and layers that run.
        patches: patches in the MLPs of these layers.
    """

    kept: list[Tensor] | None
    patches_full: int
    patches: int


@dataclass(frozen=True, eq=False)
class RemainingPatches:
    """The patches of each tile that remain at a layer.

    Args:
        index: position of each remaining patch among all patches of its tile, in the order of the sequence,
            `[tiles, remaining]`. A merged patch has the position of its representative.
        entry: the number in `index` of the remaining patch that represents each patch, `[tiles, patches]`; -1 for a
            dropped patch.
        sizes: number of patches that each remaining patch represents, float32 `[tiles, remaining]`; None if nothing is
            merged.
        cls: position of the CLS token in the sequence of the tower.
        dropped: the dropped patches that later layers restore; None if dropped patches keep their state.
    """

    index: Tensor
    entry: Tensor
    sizes: Tensor | None
    cls: Literal["none", "first", "last"]
    dropped: DroppedPatches | None = None

    @classmethod
    def all(
        cls, tiles: int, patches: int, position: Literal["none", "first", "last"], device: torch.device
    ) -> RemainingPatches:
        """Return all patches.

        Args:
            tiles: number of tiles.
            patches: number of patches of a tile.
            position: position of the CLS token in the sequence of the tower.
            device: the device of the tensors.
        """
        index = torch.arange(patches, device=device).expand(tiles, -1)
        return cls(index, index, None, position)

    @property
    def number(self) -> int:
        """Number of remaining patches of a tile."""
        return self.index.shape[1]

    @property
    def mask(self) -> Tensor:
        """Mask of the positions with a remaining patch, bool `[tiles, patches]`."""
        return torch.zeros_like(self.entry, dtype=torch.bool).scatter(1, self.index, True)

    @property
    def restored_mask(self) -> Tensor:
        """Mask of the positions with a remaining or restored patch, bool `[tiles, patches]`."""
        return self.mask if self.dropped is None else self.mask.scatter(1, self.dropped.index, True)

    @cached_property
    def sequence_index(self) -> Tensor:
        """Position of each remaining entry in the full sequence, with the CLS token, `[tiles, length]`."""
        if self.cls == "none":
            return self.index
        shift, position = (1, 0) if self.cls == "first" else (0, self.entry.shape[1])
        parts = [self.index.new_full((len(self.index), 1), position), self.index + shift]
        return torch.cat(parts if self.cls == "first" else parts[::-1], dim=1)

    @cached_property
    def sequence_entry(self) -> Tensor:
        """The number of the remaining entry of each position of the full sequence, -1 if dropped, `[tiles, length]`."""
        if self.cls == "none":
            return self.entry
        shift, number = (1, 0) if self.cls == "first" else (0, self.number)
        entry = torch.where(self.entry < 0, self.entry, self.entry + shift)
        parts = [entry.new_full((len(entry), 1), number), entry]
        return torch.cat(parts if self.cls == "first" else parts[::-1], dim=1)

    @cached_property
    def key_bias(self) -> Tensor | None:
        """Logarithm of the number of patches behind each entry, float32 `[tiles, length]`; None if nothing is merged.

        Added to the logits of attention, it makes a merged patch count like its patches (ToMe, arXiv 2210.09461,
        section 3: proportional attention).
        """
        if self.sizes is None:
            return None
        cls = self.sizes.new_zeros(len(self.sizes), int(self.cls != "none"))
        bias = self.sizes.log()
        return torch.cat([bias, cls] if self.cls == "last" else [cls, bias], dim=1)

    @cached_property
    def _bounds(self) -> list[tuple[Tensor, Tensor]]:
        return []

    def find_bounds(self, full: Tensor) -> Tensor:
        """Return the bounds of images or windows in the sequence of the remaining patches, `[1 + segments]`.

        Segments without a patch are left out: kernels of a single segment accept no empty one. Their number is read
        from the device once, because all layers share the tensor of the bounds.

        Args:
            full: the bounds in the full sequence (`cu_seqlens`), `[1 + segments]`.
        """
        stored = next((bounds for key, bounds in self._bounds if key is full), None)
        if stored is None:
            before = F.pad(self.mask[0].cumsum(dim=0), (1, 0))
            stored = before[full.long()].unique_consecutive().to(full.dtype)
            self._bounds.append((full, stored))
        return stored

    def gather(self, sequence: Tensor) -> Tensor:
        """Return the remaining entries of a sequence, `[tiles, remaining, width]`.

        Args:
            sequence: hidden states of the full length, `[tiles, length, width]`.
        """
        return sequence.gather(1, self.sequence_index[..., None].expand(-1, -1, sequence.shape[-1]))

    def restore(self, remaining: Tensor, before: Tensor) -> Tensor:
        """Return hidden states of the full length, `[tiles, length, width]`.

        Every patch of a group has the state of the group. A dropped patch keeps the state that it had before, or is
        restored (`restore_dropped`).

        Args:
            remaining: hidden states of the remaining entries, `[tiles, remaining, width]`.
            before: hidden states of the full length before the layer, `[tiles, length, width]`.
        """
        entry = self.sequence_entry[..., None]
        states = remaining.gather(1, entry.clamp(min=0).expand(-1, -1, remaining.shape[-1]))
        full = torch.where(entry < 0, before, states)
        if self.dropped is None:
            return full
        cls_token, patches = self.split_cls(full)
        restored = restore_dropped(self.dropped, self.split_cls(remaining)[1])
        index = self.dropped.index[..., None].expand_as(restored)
        return self.join_cls(cls_token, patches.scatter(1, index, restored))

    def split_cls(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Return the CLS token and the patches of a sequence, `[tiles, 0 or 1, width]` and `[tiles, patches, width]`.

        Args:
            sequence: hidden states, `[tiles, length, width]`.
        """
        if self.cls == "last":
            return sequence[:, -1:], sequence[:, :-1]
        first = int(self.cls == "first")
        return sequence[:, :first], sequence[:, first:]

    def join_cls(self, cls_token: Tensor, patches: Tensor) -> Tensor:
        """Return the sequence of the CLS token and the patches, `[tiles, length, width]`."""
        return torch.cat([patches, cls_token] if self.cls == "last" else [cls_token, patches], dim=1)

    def narrow(self, groups: PatchGroups) -> RemainingPatches:
        """Return the patches that remain after patches are dropped.

        Args:
            groups: the remaining patches; nothing is merged.
        """
        order = torch.arange(groups.kept.shape[1], device=self.index.device).expand_as(groups.kept)
        entry_of = torch.full_like(self.index, -1).scatter(1, groups.kept, order)
        entry = torch.where(self.entry < 0, self.entry, entry_of.gather(1, self.entry.clamp(min=0)))
        sizes = None if self.sizes is None else self.sizes.gather(1, groups.kept)
        return RemainingPatches(self.index.gather(1, groups.kept), entry, sizes, self.cls)

    def apply(self, groups: PatchGroups, sequence: Tensor) -> tuple[RemainingPatches, Tensor]:
        """Return the patches that remain after a step, and the sequence of their hidden states.

        Args:
            groups: the result of the step.
            sequence: hidden states of the remaining entries before the step, `[tiles, length, width]`.

        Raises:
            ValueError: if an earlier step dropped patches that are restored from all patches that it kept.
        """
        if self.dropped is not None:
            raise ValueError("a step follows a step whose dropped patches are restored; use one step")
        cls_token, patches = self.split_cls(sequence)
        if groups.group is None:
            states = gather_patches(patches, groups.kept)
            remaining = self.narrow(groups)
            if groups.neighbors is not None:
                index = list_dropped(groups.kept, self.number)
                dropped_states = gather_patches(patches, index)
                dropped = DroppedPatches(self.index.gather(1, index), dropped_states, states, groups.neighbors)
                remaining = replace(remaining, dropped=dropped)
            return remaining, self.join_cls(cls_token, states)
        states, sizes = merge_groups(patches, groups, self.sizes)
        entry = torch.where(self.entry < 0, self.entry, groups.group.gather(1, self.entry.clamp(min=0)))
        index = self.index.gather(1, groups.kept)
        return RemainingPatches(index, entry, sizes, self.cls), self.join_cls(cls_token, states)

    def expand_rows(self, values: Tensor, dim: int) -> Tensor:
        """Return a captured value of each remaining patch at its position; zero at all other positions.

        Args:
            values: values of the remaining patches, with tiles as the first dimension.
            dim: the dimension of the patches.
        """
        shape = list(values.shape)
        shape[dim] = self.entry.shape[1]
        index = self.index.view(len(self.index), *[1] * (dim - 1), -1, *[1] * (values.dim() - dim - 1))
        return values.new_zeros(shape).scatter(dim, index.expand_as(values), values)

    def expand_groups(self, values: Tensor, dim: int) -> Tensor:
        """Return a captured value of each group at all patches of the group; zero at dropped patches.

        Args:
            values: values of the remaining patches, with tiles as the first dimension.
            dim: the dimension of the patches.
        """
        entry = self.entry.view(len(self.entry), *[1] * (dim - 1), -1, *[1] * (values.dim() - dim - 1))
        shape = list(values.shape)
        shape[dim] = self.entry.shape[1]
        expanded = values.gather(dim, entry.clamp(min=0).expand(shape))
        return expanded.masked_fill(entry < 0, 0)


def gather_patches(patches: Tensor, index: Tensor) -> Tensor:
    """Return patches by their index, `[tiles, entries, width]`.

    Args:
        patches: the patches, `[tiles, patches, width]`.
        index: index of each entry, `[tiles, entries]`.
    """
    return patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))


def merge_groups(patches: Tensor, groups: PatchGroups, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the merged patches, `[tiles, kept, width]`, and the number of patches behind each, `[tiles, kept]`.

    Sums are at least float32, because sums in half precision are inexact.

    Args:
        patches: the patches, `[tiles, patches, width]`.
        groups: the groups; `group` is not None.
        sizes: number of patches behind each patch, `[tiles, patches]`; None means 1.

    Raises:
        ValueError: if the groups have no `group`.
    """
    if groups.group is None:
        raise ValueError("merge_groups needs PatchGroups with a group for each patch; group is None")
    tiles, kept = groups.kept.shape
    bins = torch.where(groups.group < 0, kept, groups.group)  # the last bin holds dropped patches
    dtype = torch.promote_types(patches.dtype, torch.float32)
    counts = torch.ones(bins.shape, dtype=dtype, device=bins.device) if sizes is None else sizes.to(dtype)
    totals = counts.new_zeros(tiles, kept + 1).scatter_add(1, bins, counts)[:, :kept]
    weights = counts if groups.weights is None else groups.weights.to(dtype)
    values = patches.to(dtype) * weights[..., None]
    sums = values.new_zeros(tiles, kept + 1, values.shape[-1])
    sums = sums.scatter_add(1, bins[..., None].expand_as(values), values)[:, :kept]
    sums = sums / totals[..., None] if groups.weights is None else sums
    return sums.to(patches.dtype), totals
