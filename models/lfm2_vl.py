"""LFM2-VL: sub-images in row-major order, the base tile last with its aspect ratio; 2 x 2 patches become one token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenprune.geometry import TileGeometry
from tokenprune.image import token_dim
from tokenprune.models._base.tiled import TiledAdapter, find_grids, placeholder_spans, split_pairs
from tokenprune.models._base.vision_inputs import read_once
from tokenprune.models._capture.signals import pool_patches
from tokenprune.rewrite import TextSeparatorSide


class Lfm2VlAdapter(TiledAdapter):
    """`Lfm2VlForConditionalGeneration`; tiles are padded to one size, and padding tokens are not valid."""

    family: ClassVar[str] = "lfm2_vl"
    model_class: ClassVar[str] = "Lfm2VlForConditionalGeneration"
    patch_steps: ClassVar[frozenset[str]] = frozenset({"drop"})  # padded patches must not be merged
    text_separator_side: ClassVar[TextSeparatorSide] = "before"
    projector_path: ClassVar[str | None] = None
    llm_mlp_name: ClassVar[str] = "feed_forward"
    final_norm_path: ClassVar[str | None] = "embedding_norm"
    pooling_config_key: ClassVar[str | None] = "downsample_factor"
    features_by_tile: ClassVar[bool] = False
    required_inputs: ClassVar[tuple[str, ...]] = ("spatial_shapes",)

    @cached_property
    def token_grid(self) -> tuple[int, int]:
        """Height x width of the tokens of a tile with one patch per position embedding.

        The tiles of a call have their sizes in `spatial_shapes`.
        """
        side = math.isqrt(self.tower.config.num_patches) // self.pooling
        return side, side

    def sizes(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return height x width of the tokens of each tile."""
        return [(height // self.pooling, width // self.pooling) for height, width in self.shapes(inputs)]

    def shapes(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return height x width of the patches of each tile.

        Raises:
            ValueError: if there is not one shape per tile.
        """
        shapes = self.input_tensor(inputs, "spatial_shapes", (len(inputs[self.pixels]), 2))
        return [(int(height), int(width)) for height, width in read_once(shapes).tolist()]

    def vision_arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the vision inputs of a call; without padding the mask is None, because it is a required argument."""
        return {"pixel_attention_mask": None, **super().vision_arguments(inputs)}

    def tiles_per_image(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the number of tiles of each image; the id after the last placeholder of a row closes an image.

        Raises:
            ValueError: if the placeholders do not fit the tiles.
        """
        ids, sizes = F.pad(self.prompt_ids(inputs), (0, 1), value=-1), self.sizes(inputs)
        tokens, spans = [height * width for height, width in sizes], placeholder_spans(ids == self.image_token_id)
        placeholders = sum(span.length for span in spans)
        if placeholders != sum(tokens):
            raise self.input_error(
                f"Image features and image tokens do not match: the prompt has {placeholders} placeholders, but the "
                f"tiles have {sum(tokens)} tokens"
            )
        after = [int(ids[span.row, span.start + span.length]) for span in spans]
        closing = {span.row: mark for span, mark in zip(spans, after, strict=True)}
        numbers, is_open, tile = list[int](), False, 0
        for span, mark in zip(spans, after, strict=True):
            end, remaining = tile, span.length
            while remaining > 0:
                remaining, end = remaining - tokens[end], end + 1
            if remaining:  # text interrupts a tile
                return [1] * len(tokens)
            numbers = [*numbers[:-1], numbers[-1] + end - tile] if is_open else [*numbers, end - tile]
            is_open, tile = mark != closing[span.row], end
        sub_images = [sizes[sum(numbers[:image]) :][: number - 1] for image, number in enumerate(numbers)]
        parts = [[1 + len(part)] if len(set(part)) < 2 else [1] * (1 + len(part)) for part in sub_images]
        return split_pairs([number for part in parts for number in part])

    def all_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tiles assembled from their patches, padded to the largest, `[tiles, 3, height, width]`."""
        patch, images = self.tower.config.patch_size, []
        shapes = self.shapes(inputs)
        side = [max(lengths) * patch for lengths in zip(*shapes, strict=True)]
        for flat, (rows, cols) in zip(inputs[self.pixels], shapes, strict=True):
            image = rearrange(flat[: rows * cols], "(h w) (y x c) -> c (h y) (w x)", h=rows, y=patch, x=patch)
            images.append(F.pad(image, (0, side[1] - cols * patch, 0, side[0] - rows * patch)))
        return torch.stack(images)

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image: every tile has the rows and columns of the largest tile of the image.

        Raises:
            ValueError: if a vision input is missing, or the placeholders do not fit the tiles.
        """
        self.check_inputs(inputs)
        sizes, numbers = self.sizes(inputs), self.tiles_per_image(inputs)
        side = self.pooling * self.tower.config.patch_size
        out = []
        for tiles in self.all_tiles(inputs).split(numbers):
            image_sizes, sizes = sizes[: len(tiles)], sizes[len(tiles) :]
            unpadded = [
                tile[:, : rows * side, : cols * side] for tile, (rows, cols) in zip(tiles, image_sizes, strict=True)
            ]
            tile_grid = find_grids([torch.stack(unpadded[:-1])], [unpadded[-1]])[0] if len(unpadded) > 1 else (0, 0)
            token_grid = (max(rows for rows, _ in image_sizes), max(cols for _, cols in image_sizes))
            layout = TileGeometry.tiled(tile_grid, token_grid, base_first=False)
            base_first = [image_sizes[-1], *image_sizes[:-1]]
            masks = [pad_grid(torch.ones(1, *size, dtype=torch.bool), token_grid)[0] for size in base_first]
            base_share = torch.tensor([image_sizes[-1][0] / token_grid[0], image_sizes[-1][1] / token_grid[1]])
            packed = layout.packed[torch.stack(masks).flatten()[layout.packed]]
            out.append(replace(layout, regions=layout.regions * base_share.repeat(2), packed=packed))
        return out

    def split_by_image(
        self, kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return a captured signal for each image: each tile is pooled with its own size, then padded."""
        values, sizes = torch.cat(list(captured)), self.sizes(inputs)
        out = []
        for layout in layouts:
            tiles, values = values[: layout.tiles], values[layout.tiles :]
            image_sizes, sizes = sizes[: layout.tiles], sizes[layout.tiles :]
            parts = []
            for value, size in zip(tiles.split(1), image_sizes, strict=True):
                dim = token_dim(kind)
                real = value.narrow(dim, 0, size[0] * size[1] * self.pooling**2)
                pooled = pool_patches(kind, real, size, self.pooling, self.patch_order).movedim(dim, -1)
                padded = pad_grid(pooled.unflatten(-1, size), layout.token_grid).flatten(-2)
                parts.append(padded.movedim(-1, dim))
            out.append(torch.cat(parts).roll(1, 0))
        return out


def pad_grid(value: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return values padded with zero rows and columns to the height and width of `grid`, `[..., height, width]`."""
    return F.pad(value, (0, grid[1] - value.shape[-1], 0, grid[0] - value.shape[-2]))
