"""The positions of the packed images of a call that enter the LLM, for all images at once.

A position holds a visual token or a newline token. Images are concatenated in the order of the prompts. The lengths of
index tensors are known on the host, so that features and prompts are gathered without reading from the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice

import torch
from torch import Tensor

from tokenprune.checks import DeferredCheck, raise_first_failure, stack_failures
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.selection import MaskCount, Selection, true_indices


@dataclass(frozen=True, eq=False)
class KeptPositions:
    """The kept positions of all images of a call, in packed order.

    Args:
        mask: the kept positions of all packed images, bool `[positions]`.
        layouts: the layout of each image.
        tokens: number of kept visual tokens of each image.
        newlines: number of kept newline tokens of each image.
    """

    mask: Tensor
    layouts: tuple[TileGeometry, ...]
    tokens: tuple[int, ...]
    newlines: tuple[int, ...]

    @classmethod
    def from_selections(cls, selections: Sequence[Selection]) -> KeptPositions:
        """Return the kept positions of images; counts that a selection does not store are read from the device."""
        return cls.from_mask(pack_masks(selections), selections)

    @classmethod
    def from_mask(cls, mask: Tensor, selections: Sequence[Selection]) -> KeptPositions:
        """Return the kept positions of images from their packed masks.

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
        """Number of kept positions of each image."""
        return [tokens + newlines for tokens, newlines in zip(self.tokens, self.newlines, strict=True)]

    @cached_property
    def index(self) -> Tensor:
        """Index of each kept position in the concatenated packed images, ascending, `[kept]`."""
        return true_indices(self.mask, sum(self.lengths))

    @cached_property
    def image_index(self) -> Tensor:
        """Index of each kept position in its packed image, `[kept]`."""
        positions, _ = position_tables(self.layouts, self.mask.device)
        return positions[self.index]

    @cached_property
    def token_index(self) -> Tensor:
        """Index of each kept visual token among the kept positions, `[tokens]`."""
        if not sum(self.newlines):
            return torch.arange(sum(self.tokens), device=self.mask.device)
        _, is_token = position_tables(self.layouts, self.mask.device)
        return true_indices(is_token[self.index], sum(self.tokens))


@lru_cache(maxsize=256)
def position_tables(layouts: tuple[TileGeometry, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the index of each position in its packed image, int64, and whether it holds a visual token, bool.

    Args:
        layouts: the layout of each image.
        device: the device of the tables.

    Returns:
        Two tensors for the concatenated packed images, `[positions]` each.
    """
    with torch.inference_mode(False):  # a later call may record gradients
        originals = [layout.original for layout in layouts]
        positions = torch.cat([torch.arange(len(layout.packed), device=layout.packed.device) for layout in originals])
        is_token = torch.cat([layout.packed != NEWLINE for layout in originals])
        return positions.to(device), is_token.to(device)


def group_selections(selections: Sequence[Selection], *attributes: str) -> list[list[int]]:
    """Return the indices of the selections in groups of one layout and equal attributes.

    Args:
        selections: the selections.
        attributes: names of attributes that are equal inside a group.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, selection in enumerate(selections):
        values = tuple(getattr(selection, name) for name in attributes)
        groups.setdefault((selection.geometry.original, selection.kept.device, values), []).append(number)
    return list(groups.values())


def pack_masks(selections: Sequence[Selection]) -> Tensor:
    """Return the mask of the kept positions of all packed images, concatenated, bool `[positions]`.

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
        packed = flat[:, layout.pack_index]
        if len(numbers) == len(selections):
            return packed.flatten()
        masks.update(zip(numbers, packed.unbind(), strict=True))
    device = selections[0].kept.device
    return torch.cat([masks[number].to(device) for number in range(len(selections))])


def _newline_mask(selection: Selection, layout: TileGeometry) -> Tensor:
    mask = selection.newline_mask
    return selection.kept.new_zeros(layout.newlines) if mask is None else mask.to(selection.kept.device)


def read_counts(
    selections: Sequence[Selection], mask: Tensor, checks: Sequence[DeferredCheck], dropped_text: Tensor | None = None
) -> tuple[list[Selection], list[int], bool]:
    """Return the selections with their counts, after at most one read from the device, which also reads the checks.

    If all counts follow from the budgets, nothing is read from an accelerator. On a CPU the checks are always
    read.

    Args:
        selections: the selections of a call.
        mask: the mask of their kept positions (`pack_masks`), bool `[positions]`.
        checks: the checks of the selections.
        dropped_text: text positions of the prompts that are dropped, bool `[rows, length]`; None drops no text.

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
    parts = [] if None not in newlines else [count_kept(mask, [s.geometry for s in selections])]
    uncounted = [number for number, count in enumerate(tokens) if count is None]
    for numbers in group_selections([selections[number] for number in uncounted]):
        kept = torch.stack([selections[uncounted[number]].kept for number in numbers])
        parts.append(kept.flatten(1).sum(dim=1).to(mask.device))
    parts += [stack_failures(checks, mask.device)] if checks else []
    parts += [] if dropped_text is None else [dropped_text.sum(dim=1)]
    values = iter(torch.cat(parts).tolist() if parts else ())
    totals = list(islice(values, len(selections))) if None in newlines else None
    for numbers in group_selections([selections[number] for number in uncounted]):
        for number in numbers:
            tokens[uncounted[number]] = next(values)
    raise_first_failure(checks, list(islice(values, len(checks))))
    counted = []
    for number, selection in enumerate(selections):
        count, newline_count = tokens[number], newlines[number]
        if totals is not None and count is not None:
            newline_count = totals[number] - count
        counted.append(with_counts(selection, count or 0, newline_count or 0))
    return counted, list(values), True


def count_kept(mask: Tensor, layouts: Sequence[TileGeometry]) -> Tensor:
    """Return the number of kept positions of each image, `[images]`.

    Args:
        mask: the kept positions of all images, bool `[positions]`.
        layouts: the layout of each image.
    """
    if len({layout.original for layout in layouts}) == 1:
        return mask.view(len(layouts), -1).sum(dim=1)
    return torch.stack([part.sum() for part in mask.split([len(layout.packed) for layout in layouts])])


def with_counts(selection: Selection, tokens: int, newlines: int) -> Selection:
    """Return a selection that stores its numbers of kept tokens and newline tokens.

    Args:
        selection: the selection.
        tokens: number of kept tokens.
        newlines: number of kept newline tokens.
    """
    pairs = [(selection.kept, tokens), (selection.newline_mask, newlines)]
    return replace(selection, counts=tuple(MaskCount.of(mask, n) for mask, n in pairs if mask is not None))
