"""Gemma 3: the base tile first, then crops in one row or one column (pan and scan); patches are averaged."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.models._base.tiled import TiledAdapter, grid_difference, thumbnails

MAX_DIFFERENCE = 0.5
"""Largest difference, as a fraction of the variance of the base tile, at which crops belong to a base tile."""


class Gemma3Adapter(TiledAdapter):
    """`Gemma3ForConditionalGeneration`."""

    family: ClassVar[str] = "gemma3"
    model_class: ClassVar[str] = "Gemma3ForConditionalGeneration"
    projector_path: ClassVar[str | None] = None
    base_first: ClassVar[bool] = True
    post_norm_path: ClassVar[str | None] = "post_layernorm"
    projects_per_token: ClassVar[bool] = True

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return int(self.model.base_model.multi_modal_projector.kernel_size)

    def project_patches(self, patches: Tensor) -> Tensor:
        """Return the visual tokens of the given patches: the mean of the patches, normalized and projected."""
        projector = self.model.base_model.multi_modal_projector
        normed = projector.mm_soft_emb_norm(self.apply_post_norm(patches).mean(dim=1))
        return torch.as_tensor((normed @ projector.mm_input_projection_weight).to(patches.dtype))

    def project_tiles(self, hidden: Tensor, patches: Tensor) -> Tensor:
        """Return all visual tokens of the given tiles with the projector itself, which sums in another order."""
        tokens: Tensor = self.model.base_model.multi_modal_projector(self.apply_post_norm(hidden))
        return tokens.flatten(0, 1)

    def tiles_per_image(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the number of tiles of each image: a base tile, and the crops after it whose pixels resemble it.

        The prompt has text between the base tile and its crops, and the same few ids between all crops. These ids can
        also separate two images, so only the pixels determine the last crop.

        Raises:
            ValueError: if the placeholders do not fit the tiles.
        """
        ids, tiles, numbers = self.prompt_ids(inputs), self.all_tiles(inputs), list[int]()
        spans = self.tile_spans(ids, len(tiles))
        if spans is None:
            return [1] * len(tiles)
        gaps = [
            tuple(ids[tile.row, tile.start + tile.length : following.start].tolist())
            if tile.row == following.row
            else None
            for tile, following in pairwise(spans)
        ]
        while (start := sum(numbers)) < len(tiles):
            max_crops = count_possible_crops(gaps[start:])
            differences = {
                number: crop_difference(tiles[start : start + 1 + number]) for number in range(2, max_crops + 1)
            }
            number = min(differences, key=differences.__getitem__, default=0)
            numbers.append(1 + number if number and differences[number] < MAX_DIFFERENCE else 1)
        return numbers

    def grids(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return rows x cols of the crops of each image: one row, or one column."""
        return [find_crop_grid(tiles) for tiles in parts]


def count_possible_crops(gaps: Sequence[Hashable]) -> int:
    """Return the largest number of crops that can belong to a base tile.

    Args:
        gaps: the text between each tile and the next tile, starting at the base tile; None at the end of a prompt.
    """
    if len(gaps) < 2 or None in gaps[:2] or gaps[0] == gaps[1]:
        return 0
    return 1 + sum(1 for _ in takewhile(lambda gap: gap == gaps[1], gaps[1:]))


def find_crop_grid(tiles: Tensor) -> tuple[int, int]:
    """Return rows x cols of the crops of an image: one row or one column, whichever differs less from the base tile.

    Args:
        tiles: base tile and crops, `[tiles, 3, height, width]`.
    """
    number = len(tiles) - 1
    if number == 0:
        return 0, 0
    return min((1, number), (number, 1), key=lambda grid: grid_difference(tiles[1:], tiles[0], grid))


def crop_difference(tiles: Tensor) -> float:
    """Return the difference between crops and base tile as a fraction of the variance of the base tile.

    Args:
        tiles: base tile and crops, `[tiles, 3, height, width]`.
    """
    variance = float(thumbnails(tiles[:1])[0].var(dim=(1, 2)).mean())
    return grid_difference(tiles[1:], tiles[0], find_crop_grid(tiles)) / max(variance, 1e-6)
