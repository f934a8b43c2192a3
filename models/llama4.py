"""Llama 4: sub-images in row-major order with text between them, the base tile last; 2 x 2 patches become a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from tokenprune.adapter import Encoding, LLMShape
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.geometry import TileGeometry
from tokenprune.image import Signal
from tokenprune.models._base.tiled import TiledAdapter
from tokenprune.selection import Selection


class Llama4Adapter(TiledAdapter):
    """`Llama4ForConditionalGeneration`; its tower removes the CLS token, which is the last token, itself."""

    family: ClassVar[str] = "llama4"
    model_class: ClassVar[str] = "Llama4ForConditionalGeneration"
    broken_with: ClassVar[frozenset[str]] = frozenset({"5.24.0"})  # `forward` reads the undefined `image_outputs`
    tower_path: ClassVar[str] = "vision_model"
    layers_path: ClassVar[str] = "model.layers"
    language_model_path: ClassVar[str] = "language_model.model"
    llm_mlp_name: ClassVar[str] = "feed_forward"
    patch_steps: ClassVar[frozenset[str]] = frozenset()  # all tiles share one rotary table
    grouped_by: ClassVar[Literal["opening", "closing"]] = "closing"

    features_field: ClassVar[str] = "last_hidden_state"
    projector_path: ClassVar[str | None] = None
    supports_beams: ClassVar[bool] = False

    @cached_property
    def cls(self) -> Literal["none", "first", "last"]:
        """Position of the CLS token in the sequence of the tower."""
        return "last"

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return round(1 / float(self.tower.config.pixel_shuffle_ratio))

    def grids(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return rows x cols of the sub-images: the id after the last sub-image ends each row."""
        after = [ids[:-1] for ids in self.ids_after(inputs, parts)]
        rows = [ids.count(ids[-1]) if ids else 0 for ids in after]
        return [(r, len(ids) // r) if ids else (0, 0) for r, ids in zip(rows, after, strict=True)]

    def layout(self, tiles: Tensor, grid: tuple[int, int]) -> TileGeometry:
        """Return the layout of one image, without the black padding of its sub-images at the bottom and right.

        The edges of an image can be black, too. The base tile has no padding, so it determines the black edges.
        """
        layout = super().layout(tiles, grid)
        if not layout.sub_images:
            return layout
        canvas = rearrange(tiles[:-1], "(rows cols) c h w -> c (rows h) (cols w)", rows=grid[0])
        black = tiles.amin()
        filled = [
            min(1.0, filled_fraction(canvas > black, dim) / filled_fraction(tiles[-1] > black, dim)) for dim in (1, 2)
        ]
        return replace(layout, regions=(layout.regions / torch.tensor(2 * filled)).clamp(max=1.0))

    def encode(
        self,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int = 0,
        text_model: str | None = None,
        truncated: bool = False,
        patch_reducers: Sequence[EncoderReducer] = (),
        entering: Sequence[Selection] | None = None,
    ) -> Encoding:
        """Encode the images; their features are the outputs of the final linear map of the model."""
        encoding = super().encode(inputs, needs, keep_pixels, text_model, truncated, patch_reducers, entering)
        project = self.model.multi_modal_projector
        with torch.no_grad():
            images = [image.with_features(project(image.features)) for image in encoding.images]
        return replace(encoding, images=images)

    @cached_property
    def llm(self) -> LLMShape:
        """The shape of the language model, including the experts that are active for a token."""
        config, shape = self.model.config.get_text_config(), super().llm
        active = [
            sum(weights.numel() for weights in layer.parameters() if weights.dim() == 3)
            // config.num_local_experts
            * config.num_experts_per_tok
            for layer in self.decoder.layers
        ]
        totals = (shared + routed for shared, routed in zip(shape.layer_parameters, active, strict=True))
        return replace(shape, layer_parameters=tuple(totals))


def filled_fraction(mask: Tensor, dim: int) -> float:
    """Return the extent of a mask from the top (1) or left (2) as a fraction of the side; 1.0 if the mask is empty.

    Args:
        mask: bool `[channels, height, width]`.
        dim: 1 for the height, 2 for the width.
    """
    line = mask.any(dim=0).any(dim=2 - dim)
    return (int(line.nonzero().max()) + 1) / len(line) if bool(line.any()) else 1.0
