"""Base classes of adapters whose towers encode images at their native resolution: an image is one tile."""

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

from tokenprune.geometry import TileGeometry
from tokenprune.models._base.example import EXAMPLE_IMAGE, example_decoder, pixel_generator
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.rewrite import TextSeparatorSide

EXAMPLE_TOKEN = 28
"""Side in pixels of the area of a visual token in example models."""


EXAMPLE_IDS: Mapping[str, Any] = {
    "image_token_id": EXAMPLE_IMAGE,
    "video_token_id": 4,
    "vision_start_token_id": 10,
    "vision_end_token_id": 11,
}
"""Special token ids in the configurations of example models."""


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

    tower_path: ClassVar[str] = "visual"
    layers_path: ClassVar[str] = "blocks"
    attention_name: ClassVar[str] = "attn"
    projector_path: ClassVar[str | None] = None
    patch_order: ClassVar[str] = "(h w p q)"
    one_sequence: ClassVar[bool] = True
    passes_output_options: ClassVar[bool] = True
    has_vision_positions: ClassVar[bool] = True
    required_inputs: ClassVar[tuple[str, ...]] = ("image_grid_thw",)

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return int(self.tower.spatial_merge_size)

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one tile per image, with the size of its patch grid.

        Raises:
            ValueError: if the grids are missing or do not fit the patches.
        """
        self.check_inputs(inputs)
        grids = self.input_tensor(inputs, "image_grid_thw", (None, 3)).tolist()
        patches = sum(times * rows * cols for times, rows, cols in grids)
        if patches != len(inputs[self.pixels]):
            raise self.input_error(
                f"image_grid_thw={grids} names {patches} patches, but {self.pixels} of {type(self.model).__name__} "
                f"holds {len(inputs[self.pixels])}"
            )
        return [TileGeometry.single((rows // self.pooling, cols // self.pooling)) for _, rows, cols in grids]

    def split_pixels(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the images assembled from their patches, `[1, 3, height, width]` each."""
        patch, images = self.tower.config.patch_size, []
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
            images.append(pixels[:1])
        return images

    def forward_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the positions of text, height and width that `forward` would compute, `[3, rows, length]`."""
        compute = self.model.base_model.compute_3d_position_ids
        ids = compute(**{name: inputs.get(name) for name in inspect.signature(compute).parameters})
        return super().forward_positions(inputs).expand(3, -1, -1) if ids is None else torch.as_tensor(ids)

    def counted_positions(self, mask: Tensor) -> Tensor:
        """Return equal positions for text, height and width, `[3, rows, length]`: kept tokens are counted like text."""
        return super().counted_positions(mask).expand(3, -1, -1)

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the patches of each image, with sides rounded to whole tokens of `EXAMPLE_TOKEN` pixels."""
        config = self.tower.config
        grids = [[1, *(self.pooling * max(1, round(side / EXAMPLE_TOKEN)) for side in size)] for size in sizes]
        width = 3 * config.temporal_patch_size * config.patch_size**2
        patches = [
            torch.randn(rows * cols, width, generator=pixel_generator(size))
            for (_, rows, cols), size in zip(grids, sizes, strict=True)
        ]
        return {self.pixels: torch.cat(patches), "image_grid_thw": torch.tensor(grids)}

    def example_prompts(
        self, rows: Sequence[Sequence[tuple[int, int]]], images: Mapping[tuple[int, int], Sequence[int]]
    ) -> dict[str, Any]:
        """Return inputs with random pixels, and the type id of each token."""
        inputs = super().example_prompts(rows, images)
        return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == self.image_token_id).int()}


class PixtralTowerAdapter(PlaceholderAdapter):
    """A family with a Pixtral tower: images padded to one size, `image_sizes`, and text after each row of tokens."""

    layers_path: ClassVar[str] = "transformer.layers"
    attention_name: ClassVar[str] = "attention"
    one_sequence: ClassVar[bool] = True
    text_separator_side: ClassVar[TextSeparatorSide] = "after"

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one tile per image, with the size of the image.

        Raises:
            ValueError: if sizes are missing or do not fit the pixels, or a side is not a whole number of tokens.
        """
        self.check_inputs(inputs)
        side, sizes = self.tower.config.patch_size * self.pooling, self.sizes(inputs)
        if any(height % side or width % side for height, width in sizes):
            raise self.input_error(f"image_sizes={sizes} are no whole numbers of tokens of {side} pixels")
        return [TileGeometry.single((height // side, width // side)) for height, width in sizes]

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Check that a call with images has their sizes, unless the model encodes the padded canvas without sizes."""
        super().check_inputs(inputs)
        size = inspect.signature(self.model.base_model.get_image_features).parameters["image_sizes"]
        if size.default is size.empty and inputs.get(self.pixels) is not None and inputs.get("image_sizes") is None:
            raise self.input_error(f"{type(self.model).__name__} needs image_sizes besides {self.pixels}")

    def sizes(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return height x width of each image in pixels; the size of the padded canvas if `image_sizes` is missing.

        Raises:
            ValueError: if there is not one size per image, or a size exceeds the canvas.
        """
        images, _, height, width = inputs[self.pixels].shape
        if inputs.get("image_sizes") is None:
            return [(height, width)] * images
        table = self.input_tensor(inputs, "image_sizes", (images, 2), convert=True)
        sizes = [(int(rows), int(cols)) for rows, cols in table.tolist()]
        if any(rows > height or cols > width for rows, cols in sizes):
            raise self.input_error(f"image_sizes={sizes} exceed the {height} x {width} pixels of {self.pixels}")
        return sizes

    def split_pixels(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the pixels of each image without padding, `[1, 3, height, width]` each."""
        images = zip(inputs[self.pixels], self.sizes(inputs), strict=True)
        return [pixels[None, :, :rows, :cols] for pixels, (rows, cols) in images]

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the images padded to the largest, with sides rounded to whole tokens of `EXAMPLE_TOKEN` pixels."""
        rounded = [[EXAMPLE_TOKEN * max(1, round(side / EXAMPLE_TOKEN)) for side in size] for size in sizes]
        height, width = (max(sides) for sides in zip(*rounded, strict=True))
        images = [
            F.pad(torch.randn(3, rows, cols, generator=pixel_generator(size)), (0, width - cols, 0, height - rows))
            for size, (rows, cols) in zip(sizes, rounded, strict=True)
        ]
        return {self.pixels: torch.stack(images), "image_sizes": torch.tensor(rounded)}

    def example_inputs(self, rows: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
        """Return inputs with random pixels; the id 8 ends a row of an image, 9 the last row."""
        sizes = list(dict.fromkeys(size for row in rows for size in row))
        grids = [layout.token_grid for layout in self.layouts(self.example_pixels(sizes))]
        lines = {
            size: ([self.image_token_id] * cols + [8]) * lines for size, (lines, cols) in zip(sizes, grids, strict=True)
        }
        return self.example_prompts(rows, {size: [*ids[:-1], 9] for size, ids in lines.items()})
