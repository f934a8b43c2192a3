"""LLaVA-NeXT (LLaVA-1.6): the base tile first, then the unpadded grid of sub-images with a newline after each row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tokenprune.capabilities import HasDecoder
from tokenprune.geometry import NEWLINE, RECENT_LAYOUTS, TileGeometry, anyres_regions
from tokenprune.models._base.compilable import CompilableAdapter
from tokenprune.models._base.vision_inputs import read_once


class LlavaNextAdapter(CompilableAdapter, HasDecoder):
    """`LlavaNextForConditionalGeneration` with a CLIP or SigLIP tower."""

    family: ClassVar[str] = "llava_next"
    model_class: ClassVar[str] = "LlavaNextForConditionalGeneration"
    resizable: ClassVar[bool] = True
    required_inputs: ClassVar[tuple[str, ...]] = ("image_sizes",)
    projects_per_token: ClassVar[bool] = True
    supports_image_embeds: ClassVar[bool] = True

    @property
    def newline(self) -> Tensor | None:
        """The learned newline token, `[dim]`."""
        return self.model.base_model.image_newline

    @cached_property
    def _layouts_by_size(self) -> dict[tuple[int, int], TileGeometry]:
        return {}

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image, from its size.

        Raises:
            ValueError: if sizes are missing, or there is not one size per image.
        """
        self.check_inputs(inputs)
        pixels = inputs.get(self.pixels)
        images = len(pixels) if pixels is not None and pixels.dim() == 5 else None
        table = self.input_tensor(inputs, "image_sizes", (images, 2), convert=True)
        sizes = [(int(height), int(width)) for height, width in read_once(table).tolist()]
        recent = self._layouts_by_size  # the last used size is the last entry
        for size in dict.fromkeys(sizes):
            recent[size] = recent.pop(size) if size in recent else self.layout(size)
        layouts = [recent[size] for size in sizes]
        for size in list(recent)[:-RECENT_LAYOUTS]:
            del recent[size]
        return layouts

    def layout(self, image_size: tuple[int, int]) -> TileGeometry:
        """Return the layout of an image, computed by passing token numbers through the model's own packing.

        Args:
            image_size: height x width of the image in pixels.
        """
        tile_size = self.tower.config.image_size
        tile_grid = get_anyres_image_grid_shape(image_size, self.model.config.image_grid_pinpoints, tile_size)
        tiles, tokens = 1 + tile_grid[0] * tile_grid[1], self.token_grid[0] * self.token_grid[1]
        numbers = torch.arange(tiles * tokens, dtype=torch.float64).view(tiles, tokens, 1)
        packed = self.pack(numbers, image_size, torch.tensor([NEWLINE], dtype=torch.float64))
        regions = anyres_regions(image_size, tile_grid, tile_size)
        return TileGeometry(tile_grid, self.token_grid, regions, packed[:, 0].long())

    def pack(self, tiles: Tensor, image_size: tuple[int, int], newline: Tensor) -> Tensor:
        """Return the tiles of an image as the model packs them, `[length, dim]`.

        Args:
            tiles: features, `[tiles, tokens, dim]`.
            image_size: height x width of the image in pixels.
            newline: the vector inserted after each row, `[dim]`.
        """
        packed, _ = self.model.base_model.pack_image_features(
            [tiles], [image_size], "default" if self.has_cls else "full", image_newline=newline
        )
        return torch.as_tensor(packed[0])
