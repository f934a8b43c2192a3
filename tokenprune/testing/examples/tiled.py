"""The examples of families whose images are tiles of one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.testing.examples.base import PlaceholderExample, Size, seed_pixels
from tokenprune.testing.examples.configs import EXAMPLE_TILE


class TiledExample(PlaceholderExample):
    """The example of an adapter that derives from `TiledAdapter`."""

    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the tiles of each image, in the model's order."""
        return {self.adapter.pixels: torch.cat([self.build_tiles(size) for size in sizes])}

    def choose_grid(self, size: Size) -> tuple[int, int]:
        """Return rows x cols of the sub-images of an image: as many as fit, at most two a side."""
        return fit_grid(size)

    def build_tiles(self, size: Size) -> Tensor:
        """Return the tiles of an image in the model's order, `[tiles, 3, side, side]`."""
        rows, cols = self.choose_grid(size)
        canvas = torch.randn(3, rows * EXAMPLE_TILE, cols * EXAMPLE_TILE, generator=seed_pixels(size))
        base = F.interpolate(canvas[None], (EXAMPLE_TILE, EXAMPLE_TILE), mode="bilinear", antialias=True)
        if rows * cols == 1:
            return base
        parts = rearrange(canvas, "c (rows h) (cols w) -> (rows cols) c h w", rows=rows, cols=cols)
        return torch.cat([base, parts] if self.adapter.base_first else [parts, base])

    def build_inputs(self, rows: Sequence[Sequence[Size]]) -> dict[str, Any]:
        """Return inputs with random pixels."""
        sizes = dict.fromkeys(size for row in rows for size in row)
        return self.build_prompts(rows, {size: self.build_image_ids(self.choose_grid(size)) for size in sizes})

    def build_image_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the token ids of an image; 8 opens it, or precedes its base tile, and 9 closes it.

        Args:
            grid: rows x cols of its sub-images; (1, 1) for an image without sub-images.
        """
        sub_images = grid[0] * grid[1]
        number = sub_images + int(sub_images > 1)
        if self.adapter.grouped_by == "closing":
            return [*[10, *self.tile_ids] * (number - 1), 8, *self.tile_ids, 9]
        return [8, *self.tile_ids * number, 9]

    @property
    def tile_ids(self) -> list[int]:
        """Placeholder ids of one tile."""
        return [self.adapter.image_token_id] * self.adapter.tokens_per_tile


class NestedTilesExample(TiledExample):
    """The example of an adapter that derives from `NestedTilesAdapter`."""

    def build_prompts(self, rows: Sequence[Sequence[Size]], images: Mapping[Size, Sequence[int]]) -> dict[str, Any]:
        """Return inputs with random pixels, the tiles of each row padded to the largest number."""
        no_tiles = torch.zeros(0, 3, EXAMPLE_TILE, EXAMPLE_TILE)
        tiles = [torch.cat([no_tiles, *(self.build_tiles(size) for size in row)]) for row in rows]
        return {**super().build_prompts(rows, images), self.adapter.pixels: pad_sequence(tiles, batch_first=True)}


def fit_grid(size: Size) -> tuple[int, int]:
    """Return rows x cols of the tiles that an image fills, at most two a side.

    Args:
        size: height x width of the image in pixels.
    """
    rows, cols = (min(2, max(1, round(side / EXAMPLE_TILE))) for side in size)
    return rows, cols
