"""Base class of adapters whose images are one tile each, without newline tokens or text separators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenprune.geometry import TileGeometry
from tokenprune.models._base.example import EXAMPLE_TILE, pixel_generator
from tokenprune.models._base.placeholder import PlaceholderAdapter


class SingleTileAdapter(PlaceholderAdapter):
    """A family in which every image is one base tile of a fixed size."""

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one single-tile layout per image."""
        return [TileGeometry.single(self.token_grid)] * len(inputs[self.pixels])

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return one tile per image."""
        tiles = [torch.randn(3, EXAMPLE_TILE, EXAMPLE_TILE, generator=pixel_generator(size)) for size in sizes]
        return {self.pixels: torch.stack(tiles)}
