"""Base classes of adapters whose towers encode images at their native resolution: an image is one tile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.capabilities import HasDecoder
from tokenprune.geometry import TileGeometry
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._base.vision_inputs import read_once
from tokenprune.models._capture.hooks import replaced_forward
from tokenprune.models._capture.patch_reduction import PatchReduction
from tokenprune.models._capture.vision_run import VisionRun
from tokenprune.rewrite import TextSeparatorSide


class MergedPatchesAdapter(PlaceholderAdapter, HasDecoder):
    """A family with Qwen's interface: flat patches in merge blocks, `image_grid_thw`, and M-RoPE."""

    tower_path: ClassVar[str] = "visual"
    layers_path: ClassVar[str] = "blocks"
    attention_name: ClassVar[str] = "attn"
    patch_steps: ClassVar[frozenset[str]] = frozenset({"drop"})
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

    @property
    def mergers(self) -> Sequence[nn.Module]:
        """The modules of the tower that map the hidden states of each token to a visual token."""
        return [self.tower.merger]

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one tile per image, with the size of its patch grid.

        Raises:
            ValueError: if the grids are missing or do not fit the patches.
        """
        self.check_inputs(inputs)
        grids = read_once(self.input_tensor(inputs, "image_grid_thw", (None, 3))).tolist()
        patches = sum(times * rows * cols for times, rows, cols in grids)
        if patches != len(inputs[self.pixels]):
            raise self.input_error(
                f"image_grid_thw={grids} names {patches} patches, but {self.pixels} of {type(self.model).__name__} "
                f"holds {len(inputs[self.pixels])}"
            )
        return [TileGeometry.single((rows // self.pooling, cols // self.pooling)) for _, rows, cols in grids]

    def run_vision_side(
        self,
        inputs: Mapping[str, Any],
        layouts: Sequence[TileGeometry],
        kinds_by_layer: dict[int, set[str]],
        truncated: bool,
        patches: PatchReduction | None = None,
    ) -> VisionRun:
        """Run the model's own `get_image_features`; if tokens were dropped before the tower, merge only kept ones."""
        if patches is None or patches.entering is None:
            return super().run_vision_side(inputs, layouts, kinds_by_layer, truncated, patches)
        block, tokens = self.pooling**2, sum(layout.tokens for layout in layouts)
        kept = torch.cat(list(patches.entering))[::block].div(block, rounding_mode="floor")
        with ExitStack() as undo:
            for module in self.mergers:
                undo.enter_context(replaced_forward(module, partial(merge_kept, module.forward, kept, tokens)))
            return super().run_vision_side(inputs, layouts, kinds_by_layer, truncated, patches)

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

    def compute_forward_position_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the positions of text, height and width that `forward` would compute, `[3, rows, length]`."""
        compute = self.model.base_model.compute_3d_position_ids
        ids = compute(**{name: inputs.get(name) for name in inspect.signature(compute).parameters})
        return super().compute_forward_position_ids(inputs).expand(3, -1, -1) if ids is None else torch.as_tensor(ids)

    def count_position_ids(self, mask: Tensor) -> Tensor:
        """Return equal positions for text, height and width, `[3, rows, length]`: kept tokens are counted like text."""
        return super().count_position_ids(mask).expand(3, -1, -1)


def merge_kept(forward: Callable[[Tensor], Tensor], kept: Tensor, tokens: int, hidden: Tensor) -> Tensor:
    """Return the visual tokens of all images, `[tokens, dim]`; zero for tokens that were dropped.

    Args:
        forward: maps the hidden states of tokens to visual tokens.
        kept: the kept tokens in the order of the tower, `[kept]`.
        tokens: number of tokens.
        hidden: hidden states of all patches or tokens, `[patches or tokens, width]`.
    """
    merged = forward(hidden.unflatten(0, (tokens, -1))[kept].flatten(0, 1))
    return merged.new_zeros(tokens, merged.shape[-1]).index_copy(0, kept, merged)


class PixtralTowerAdapter(PlaceholderAdapter, HasDecoder):
    """A family with a Pixtral tower: images padded to one size, `image_sizes`, and text after each row of tokens."""

    layers_path: ClassVar[str] = "transformer.layers"
    attention_name: ClassVar[str] = "attention"
    tower_mlp_name: ClassVar[str] = "feed_forward"
    patch_steps: ClassVar[frozenset[str]] = frozenset({"drop"})
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
        sizes = [(int(rows), int(cols)) for rows, cols in read_once(table).tolist()]
        if any(rows > height or cols > width for rows, cols in sizes):
            raise self.input_error(f"image_sizes={sizes} exceed the {height} x {width} pixels of {self.pixels}")
        return sizes

    def split_pixels(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the pixels of each image without padding, `[1, 3, height, width]` each."""
        images = zip(inputs[self.pixels], self.sizes(inputs), strict=True)
        return [pixels[None, :, :rows, :cols] for pixels, (rows, cols) in images]
