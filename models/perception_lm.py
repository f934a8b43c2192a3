"""PerceptionLM: the base tile first, then sub-images in row-major order without text between; average pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration

from tokenprune.adapter import Encoding, FeatureInputs
from tokenprune.models._base.example import EXAMPLE_IMAGE, EXAMPLE_TILE, example_llm, with_sharp_attention
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
        tiles: Tensor = inputs[self.pixels].flatten(0, 1)
        return tiles

    def tiles_per_image(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the number of tiles of each image: the pixels are `[images, tiles, 3, height, width]`."""
        images, tiles = inputs[self.pixels].shape[:2]
        return [tiles] * images

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], places: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return `mm_encoder_outputs` in an output object that chunked prefill can slice, unlike the object of timm."""
        return super().features_to_inputs(replace(encoding, outputs=None), packed, places)

    def example_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return a grid of four tiles for every example image."""
        return min([(2, 2), (1, 4), (4, 1)], key=lambda grid: abs(grid[0] / grid[1] - size[0] / size[1]))

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the tiles of each image, in the model's order."""
        return {self.pixels: torch.stack([self.example_tiles(size) for size in sizes])}

    @classmethod
    def example(cls) -> Any:
        """Return a tiny PerceptionLM: 2 x 2 tokens a tile, of 4 x 4 patches."""
        torch.manual_seed(0)
        shape = {"embed_dim": 32, "depth": 4, "num_heads": 4, "img_size": [EXAMPLE_TILE] * 2, "ref_feat_shape": [4, 4]}
        config = PerceptionLMConfig(
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_lang_large_patch14_448",
                "do_pooling": False,
                "model_args": {**shape, "global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1},
            },
            text_config=example_llm(),
            projector_pooling_ratio=2,
            image_token_id=EXAMPLE_IMAGE,
            video_token_id=4,
        )
        return with_sharp_attention(PerceptionLMForConditionalGeneration(config))
