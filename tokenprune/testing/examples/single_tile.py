"""The example of a family whose images are one tile each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenprune.testing.examples.base import PlaceholderExample, Size, seed_pixels
from tokenprune.testing.examples.configs import EXAMPLE_TILE


class SingleTileExample(PlaceholderExample):
    """The example of an adapter that derives from `SingleTileAdapter`."""

    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return one tile per image."""
        tiles = [torch.randn(3, EXAMPLE_TILE, EXAMPLE_TILE, generator=seed_pixels(size)) for size in sizes]
        return {self.adapter.pixels: torch.stack(tiles)}
