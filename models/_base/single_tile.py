"""What the adapters share whose images are one tile each, without separators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenprune.image import TileGeometry
from tokenprune.models._base.example import EXAMPLE_TILE, seeded
from tokenprune.models._base.placeholder import PlaceholderAdapter


class SingleTileAdapter(PlaceholderAdapter):
    """A family whose images are one base tile of one size each."""

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one single-tile layout per image."""
        return [TileGeometry.single(self.token_grid)] * len(inputs[self.pixels])

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return one tile per image."""
        tiles = [torch.randn(3, EXAMPLE_TILE, EXAMPLE_TILE, generator=seeded(size)) for size in sizes]
        return {self.pixels: torch.stack(tiles)}
