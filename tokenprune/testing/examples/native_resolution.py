"""The examples of families whose towers encode images at their native resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tokenprune.testing.examples.base import PlaceholderExample, Size, seed_pixels
from tokenprune.testing.examples.configs import EXAMPLE_TOKEN


class MergedPatchesExample(PlaceholderExample):
    """The example of an adapter that derives from `MergedPatchesAdapter`."""

    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the patches of each image, with sides rounded to whole tokens of `EXAMPLE_TOKEN` pixels."""
        config, pooling = self.adapter.tower.config, self.adapter.pooling
        grids = [[1, *(pooling * max(1, round(side / EXAMPLE_TOKEN)) for side in size)] for size in sizes]
        width = 3 * config.temporal_patch_size * config.patch_size**2
        patches = [
            torch.randn(rows * cols, width, generator=seed_pixels(size))
            for (_, rows, cols), size in zip(grids, sizes, strict=True)
        ]
        return {self.adapter.pixels: torch.cat(patches), "image_grid_thw": torch.tensor(grids)}

    def build_prompts(self, rows: Sequence[Sequence[Size]], images: Mapping[Size, Sequence[int]]) -> dict[str, Any]:
        """Return inputs with random pixels, and the type id of each token."""
        inputs = super().build_prompts(rows, images)
        return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == self.adapter.image_token_id).int()}


class PixtralTowerExample(PlaceholderExample):
    """The example of an adapter that derives from `PixtralTowerAdapter`."""

    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the images padded to the largest, with sides rounded to whole tokens of `EXAMPLE_TOKEN` pixels."""
        rounded = [[EXAMPLE_TOKEN * max(1, round(side / EXAMPLE_TOKEN)) for side in size] for size in sizes]
        height, width = (max(sides) for sides in zip(*rounded, strict=True))
        images = [
            F.pad(torch.randn(3, rows, cols, generator=seed_pixels(size)), (0, width - cols, 0, height - rows))
            for size, (rows, cols) in zip(sizes, rounded, strict=True)
        ]
        return {self.adapter.pixels: torch.stack(images), "image_sizes": torch.tensor(rounded)}

    def build_inputs(self, rows: Sequence[Sequence[Size]]) -> dict[str, Any]:
        """Return inputs with random pixels; the id 8 ends a row of an image, 9 the last row."""
        sizes = list(dict.fromkeys(size for row in rows for size in row))
        grids = [layout.token_grid for layout in self.adapter.layouts(self.build_pixels(sizes))]
        ids = {
            size: ([self.adapter.image_token_id] * cols + [8]) * lines
            for size, (lines, cols) in zip(sizes, grids, strict=True)
        }
        return self.build_prompts(rows, {size: [*image_ids[:-1], 9] for size, image_ids in ids.items()})
