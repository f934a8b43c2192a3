"""What the adapters share whose towers take pictures at their own resolution: an image is one tile."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import PixtralVisionConfig

from tokenprune.image import TileGeometry
from tokenprune.models.example import EXAMPLE_IMAGE, example_decoder, seeded
from tokenprune.models.placeholder import PlaceholderAdapter
from tokenprune.rewrite import TextSeparatorSide

EXAMPLE_TOKEN = 28
"""Side in pixels of what a visual token shows in example models."""


EXAMPLE_IDS: Mapping[str, Any] = {
    "image_token_id": EXAMPLE_IMAGE,
    "video_token_id": 4,
    "vision_start_token_id": 10,
    "vision_end_token_id": 11,
}
"""Ids that the configurations of example models name."""


def example_mrope_llm() -> dict[str, Any]:
    """Return the text configuration of a tiny model with M-RoPE, for example models."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return example_decoder(num_key_value_heads=2, rope_parameters=rope)


def example_pixtral(patch_size: int) -> PixtralVisionConfig:
    """Return the configuration of a tiny Pixtral tower, for example models."""
    return PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8 * EXAMPLE_TOKEN,
        patch_size=patch_size,
    )


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

    def tiles_of(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the images put together from their patches, `[1, 3, height, width]` each."""
        patch, shown = self.tower.config.patch_size, []
        sizes = [layout.tokens * self.pooling**2 for layout in layouts]
        for flat, layout in zip(torch.split(inputs[self.pixels], sizes), layouts, strict=True):
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
            shown.append(pixels[:1])
        return shown

    def forward_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the positions of text, height and width that `forward` would make, `[3, rows, length]`."""
        compute = self.model.base_model.compute_3d_position_ids
        ids = compute(**{name: inputs.get(name) for name in inspect.signature(compute).parameters})
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


class PixtralTowerAdapter(PlaceholderAdapter):
    """A family with a Pixtral tower: pictures padded to one size, `image_sizes`, and text after each row of tokens."""

    layers_at: ClassVar[str] = "transformer.layers"
    attention_at: ClassVar[str] = "attention"
    one_sequence: ClassVar[bool] = True
    text_separator_side: ClassVar[TextSeparatorSide] = "after"

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one tile per image, of the size that its picture has.

        Raises:
            ValueError: if sizes are missing, or a side is no whole number of tokens.
        """
        side, sizes = self.tower.config.patch_size * self.pooling, inputs.get("image_sizes")
        if sizes is None:
            raise ValueError(f"{self.model_class} with a Pixtral tower needs image_sizes beside pixel_values")
        sizes = torch.as_tensor(sizes)
        if bool((sizes % side).any()):
            raise ValueError(
                f"image_sizes={sizes.tolist()} are no whole numbers of tokens of {side} pixels; make the inputs with "
                "the processor that belongs to the model"
            )
        return [TileGeometry.single((rows, cols)) for rows, cols in (sizes // side).tolist()]

    def tiles_of(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the pixels of each image without padding, `[1, 3, height, width]` each."""
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        return [one[None, :, :rows, :cols] for one, (rows, cols) in zip(inputs[self.pixels], sizes, strict=True)]

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return each picture padded to the largest, its sides rounded to whole tokens of `EXAMPLE_TOKEN` pixels."""
        rounded = [[EXAMPLE_TOKEN * max(1, round(side / EXAMPLE_TOKEN)) for side in size] for size in sizes]
        height, width = (max(sides) for sides in zip(*rounded, strict=True))
        pictures = [
            F.pad(torch.randn(3, rows, cols, generator=seeded(size)), (0, width - cols, 0, height - rows))
            for size, (rows, cols) in zip(sizes, rounded, strict=True)
        ]
        return {self.pixels: torch.stack(pictures), "image_sizes": torch.tensor(rounded)}

    def example_inputs(self, rows: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
        """Return inputs with random pixels; the id 8 ends a row of an image, 9 the last one."""
        sizes = list(dict.fromkeys(size for row in rows for size in row))
        grids = [layout.token_grid for layout in self.layouts(self.example_pixels(sizes))]
        lines = {
            size: ([self.image_token_id] * cols + [8]) * lines for size, (lines, cols) in zip(sizes, grids, strict=True)
        }
        return self.example_prompts(rows, {size: [*ids[:-1], 9] for size, ids in lines.items()})
