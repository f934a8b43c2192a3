"""What the adapters share whose towers take pictures at their own resolution: an image is one tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from tokenprune.image import TileGeometry
from tokenprune.models.placeholder import PlaceholderAdapter, as_pictures, seeded


class MergedPatchesAdapter(PlaceholderAdapter):
    """A family with Qwen's interface: flat patches in merge blocks, `image_grid_thw`, and M-RoPE."""

    tower_at: ClassVar[str] = "visual"
    layers_at: ClassVar[str] = "blocks"
    attention_at: ClassVar[str] = "attn"
    projector_at: ClassVar[str | None] = None
    patch_order: ClassVar[str] = "(h w p q)"
    one_sequence: ClassVar[bool] = True
    vision_positions: ClassVar[bool] = True

    @cached_property
    def pooling(self) -> int:
        """Patches along a side that become one visual token."""
        return int(self.tower.spatial_merge_size)

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one tile per image, of the size that its patches have."""
        grids = inputs["image_grid_thw"].tolist()
        return [TileGeometry.single((rows // self.pooling, cols // self.pooling)) for _, rows, cols in grids]

    def pictures(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry], number: int) -> list[Tensor]:
        """Return the first images put together from their patches, `[1, height, width, 3]` each."""
        patch, shown = self.tower.config.patch_size, []
        sizes = [layout.tokens * self.pooling**2 for layout in layouts]
        for flat, layout in list(zip(torch.split(inputs[self.pixels], sizes), layouts, strict=True))[:number]:
            pixels = rearrange(
                flat,
                "(h w p q) (c time y x) -> time c (h p y) (w q x)",
                h=layout.token_grid[0],
                w=layout.token_grid[1],
                p=self.pooling,
                q=self.pooling,
                c=3,
                y=patch,
                x=patch,
            )
            shown.append(as_pictures(pixels[:1]))
        return shown

    def forward_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the positions of text, height and width that `forward` would make, `[3, rows, length]`."""
        base = self.model.base_model
        ids = base.compute_3d_position_ids(
            input_ids=inputs.get("input_ids"),
            inputs_embeds=inputs.get("inputs_embeds"),
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=inputs.get("attention_mask"),
            mm_token_type_ids=inputs.get("mm_token_type_ids"),
        )
        return super().forward_positions(inputs).expand(3, -1, -1) if ids is None else torch.as_tensor(ids)

    def counted_positions(self, mask: Tensor) -> Tensor:
        """Return one count for text, height and width: what stays of an image is a line, `[3, rows, length]`."""
        return super().counted_positions(mask).expand(3, -1, -1)

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the patches of each picture, its sides rounded to whole tokens of `EXAMPLE_TOKEN` pixels."""
        config = self.tower.config
        grids = [[1, *(self.pooling * max(1, round(side / EXAMPLE_TOKEN)) for side in size)] for size in sizes]
        width = 3 * config.temporal_patch_size * config.patch_size**2
        patches = [
            torch.randn(rows * cols, width, generator=seeded(size))
            for (_, rows, cols), size in zip(grids, sizes, strict=True)
        ]
        return {self.pixels: torch.cat(patches), "image_grid_thw": torch.tensor(grids)}

    def example_prompts(
        self, rows: Sequence[Sequence[tuple[int, int]]], images: Mapping[tuple[int, int], Sequence[int]]
    ) -> dict[str, Any]:
        """Return inputs with random pixels, and the kind of each token."""
        inputs = super().example_prompts(rows, images)
        return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == self.image_token_id).int()}


EXAMPLE_TOKEN = 28
"""Side in pixels of what a visual token shows in example models."""
