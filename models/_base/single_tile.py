"""Base class of adapters whose images are one tile each, without newline tokens or text separators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.capabilities import HasDecoder
from tokenprune.geometry import TileGeometry
from tokenprune.models._base.placeholder import PlaceholderAdapter


class SingleTileAdapter(PlaceholderAdapter, HasDecoder):
    """A family in which every image is one base tile of a fixed size."""

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one single-tile layout per image."""
        return [TileGeometry.single(self.token_grid)] * len(inputs[self.pixels])
