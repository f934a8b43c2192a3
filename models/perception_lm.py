"""PerceptionLM: the base tile first, then sub-images in row-major order without text between; average pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from torch import Tensor

from tokenprune.adapter import Encoding, FeatureInputs
from tokenprune.models._base.tiled import TiledAdapter


class PerceptionLMAdapter(TiledAdapter):
    """`PerceptionLMForConditionalGeneration`: a Perception Encoder of timm; an equal number of tiles per image."""

    family: ClassVar[str] = "perception_lm"
    model_class: ClassVar[str] = "PerceptionLMForConditionalGeneration"
    layers_path: ClassVar[str] = "timm_model.blocks"
    attention_name: ClassVar[str] = "attn"
    projector_path: ClassVar[str | None] = None
    pooling_config_key: ClassVar[str | None] = "projector_pooling_ratio"
    base_first: ClassVar[bool] = True

    @cached_property
    def cls(self) -> Literal["none", "first", "last"]:
        """Position of the CLS token in the sequence of the tower."""
        return "first" if self.model.config.vision_use_cls_token else "none"

    @cached_property
    def token_grid(self) -> tuple[int, int]:
        """Height x width of the visual tokens of one tile.

        Raises:
            ValueError: if the patch grid is not a multiple of the pooling, so that tokens share patches.
        """
        rows, cols = self.tower.timm_model.patch_embed.grid_size
        if rows % self.pooling or cols % self.pooling:
            raise ValueError(f"{rows} x {cols} patches cannot be pooled by {self.pooling} without overlap")
        return rows // self.pooling, cols // self.pooling

    def all_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tiles that the tower encodes, `[tiles, 3, height, width]`."""
        return inputs[self.pixels].flatten(0, 1)

    def tiles_per_image(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the number of tiles of each image: the pixels are `[images, tiles, 3, height, width]`."""
        images, tiles = inputs[self.pixels].shape[:2]
        return [tiles] * images

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], positions: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return `mm_encoder_outputs` in an output object that chunked prefill can slice, unlike the object of timm."""
        return super().features_to_inputs(replace(encoding, outputs=None), packed, positions)
