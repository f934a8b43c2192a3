"""The entries of the packed images of a call that enter the LLM, for all images at once.

An entry is a visual token or a newline token. Images are concatenated in the order of the prompts. Index tensors have a
length that the host knows, so features and prompts are gathered without reading from the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice

import torch
from torch import Tensor

from tokenprune.faults import Fault, raise_first, stack_flags
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.selection import MaskCount, Selection, true_indices


@dataclass(frozen=True, eq=False)
class KeptEntries:
    """The kept entries of the images of a call.

    Args:
        mask: the kept entries of all packed images, bool `[entries]`.
        layouts: the layout of each image.
        tokens: number of kept visual tokens of each image.
        newlines: number of kept newline tokens of each image.
    """

    mask: Tensor
    layouts: tuple[TileGeometry, ...]
    tokens: tuple[int, ...]
    newlines: tuple[int, ...]

    @classmethod
    def from_selections(cls, selections: Sequence[Selection]) -> KeptEntries:
        """Return the kept entries of images; numbers that a selection does not store are read from the device."""
        return cls.from_counted(pack_masks(selections), selections)

    @classmethod
    def from_counted(cls, mask: Tensor, selections: Sequence[Selection]) -> KeptEntries:
        """Return the kept entries of images whose packed masks are known.

        Args:
            mask: the result of `pack_masks`.
            selections: the selections.
        """
        return cls(
            mask,
            tuple(selection.geometry for selection in selections),
            tuple(selection.kept_tokens for selection in selections),
            tuple(selection.kept_newlines for selection in selections),
        )

    @property
    def lengths(self) -> list[int]:
        """Number of kept entries of each image."""
        return [tokens + newlines for tokens, newlines in zip(self.tokens, self.newlines, strict=True)]

    @cached_property
    def index(self) -> Tensor:
        """Position of each kept entry in the concatenated packed images, ascending, `[kept]`."""
        return true_indices(self.mask, sum(self.lengths))

    @cached_property
    def position(self) -> Tensor:
        """Position of each kept entry in the packed order of its image, `[kept]`."""
        positions, _ = entry_tables(self.layouts, self.mask.device)
        return positions[self.index]

    @cached_property
    def token_index(self) -> Tensor:
        """Position of each kept visual token among the kept entries, `[tokens]`."""
        if not sum(self.newlines):
            return torch.arange(sum(self.tokens), device=self.mask.device)
        _, is_token = entry_tables(self.layouts, self.mask.device)
        return true_indices(is_token[self.index], sum(self.tokens))


@lru_cache(maxsize=256)
def entry_tables(layouts: tuple[TileGeometry, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the position of each entry in its image, int64 `[entries]`, and whether it is a visual token, bool.

    Args:
        layouts: the layout of each image.
        device: the device of the tables.
    """
    with torch.inference_mode(False):  # a later call may record gradients
        hosts = [layout.host for layout in layouts]
        positions = torch.cat([torch.arange(len(layout.packed), device=layout.packed.device) for layout in hosts])
        is_token = torch.cat([layout.packed != NEWLINE for layout in hosts])
        return positions.to(device), is_token.to(device)


def group_selections(selections: Sequence[Selection], *attributes: str) -> list[list[int]]:
    """Return the numbers of the selections in groups of one layout and equal attributes.

    Args:
        selections: the selections.
        attributes: names of attributes that are equal inside a group.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, selection in enumerate(selections):
        values = tuple(getattr(selection, name) for name in attributes)
        groups.setdefault((selection.geometry.host, selection.kept.device, values), []).append(number)
    return list(groups.values())


def pack_masks(selections: Sequence[Selection]) -> Tensor:
    """Return the kept entries of the packed images, concatenated, bool `[entries]`.

    Args:
        selections: the selections, with masks of newline tokens.
    """
    if not selections:
        return torch.zeros(0, dtype=torch.bool)
    masks: dict[int, Tensor] = {}
    for numbers in group_selections(selections):
        layout = selections[numbers[0]].geometry.to(selections[numbers[0]].kept.device)
        flat = torch.stack([selections[number].kept for number in numbers]).flatten(1)
        if layout.newlines:
            flat = torch.cat([flat, torch.stack([_newline_mask(selections[n], layout) for n in numbers])], dim=1)
        packed = flat[:, layout.packed_source]
        if len(numbers) == len(selections):
            return packed.flatten()
        masks.update(zip(numbers, packed.unbind(), strict=True))
    device = selections[0].kept.device
    return torch.cat([masks[number].to(device) for number in range(len(selections))])


def _newline_mask(selection: Selection, layout: TileGeometry) -> Tensor:
    mask = selection.newline_mask
    return selection.kept.new_zeros(layout.newlines) if mask is None else mask.to(selection.kept.device)


def read_counts(
    selections: Sequence[Selection], mask: Tensor, faults: Sequence[Fault], dropped_text: Tensor | None = None
) -> tuple[list[Selection], list[int], bool]:
    """Return selections whose counts are known, after at most one read from the device.

    Nothing is read from an accelerator if all counts follow from the budgets. On a CPU the checks are always read.

    Args:
        selections: the selections of a call.
        mask: their kept entries (`pack_masks`), bool `[entries]`.
        faults: the checks of the selections.
        dropped_text: text positions of the prompts that are dropped, bool `[rows, length]`; None drops none.

    Returns:
        The selections, the number of dropped text positions of each row, and whether the checks were read.

    Raises:
        ValueError: if a check failed.
    """
    if not selections:
        return [], [], True
    tokens, newlines = [s.token_count for s in selections], [s.newline_count for s in selections]
    if None not in tokens and None not in newlines and dropped_text is None and mask.device.type != "cpu":
        return list(selections), [], False
    parts = [] if None not in newlines else [count_entries(mask, [s.geometry for s in selections])]
    uncounted = [number for number, count in enumerate(tokens) if count is None]
    for numbers in group_selections([selections[number] for number in uncounted]):
        kept = torch.stack([selections[uncounted[number]].kept for number in numbers])
        parts.append(kept.flatten(1).sum(dim=1).to(mask.device))
    parts += [stack_flags(faults, mask.device)] if faults else []
    parts += [] if dropped_text is None else [dropped_text.sum(dim=1)]
    values = iter(torch.cat(parts).tolist() if parts else ())
    totals = list(islice(values, len(selections))) if None in newlines else None
    for numbers in group_selections([selections[number] for number in uncounted]):
        for number in numbers:
            tokens[uncounted[number]] = next(values)
    raise_first(faults, list(islice(values, len(faults))))
    counted = []
    for number, selection in enumerate(selections):
        count, newline_count = tokens[number], newlines[number]
        if totals is not None and count is not None:
            newline_count = totals[number] - count
        counted.append(with_counts(selection, count or 0, newline_count or 0))
    return counted, list(values), True


def count_entries(mask: Tensor, layouts: Sequence[TileGeometry]) -> Tensor:
    """Return the number of kept entries of each image, `[images]`.

    Args:
        mask: the kept entries of all images, bool `[entries]`.
        layouts: the layout of each image.
    """
    if len({layout.host for layout in layouts}) == 1:
        return mask.view(len(layouts), -1).sum(dim=1)
    return torch.stack([part.sum() for part in mask.split([len(layout.packed) for layout in layouts])])


def with_counts(selection: Selection, tokens: int, newlines: int) -> Selection:
    """Return a selection whose numbers of kept tokens and newline tokens are known.

    Args:
        selection: the selection.
        tokens: number of kept tokens.
        newlines: number of kept newline tokens.
    """
    pairs = [(selection.kept, tokens), (selection.newline_mask, newlines)]
    return replace(selection, counts=tuple(MaskCount.of(mask, n) for mask, n in pairs if mask is not None))
