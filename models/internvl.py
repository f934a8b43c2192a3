"""InternVL: sub-images in row-major order, the thumbnail last; four patches become one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from tokenprune.image import Signal
from tokenprune.models._base.example import (
    EXAMPLE_IMAGE,
    EXAMPLE_TILE,
    example_llm,
    example_tower,
    with_sharp_attention,
)
from tokenprune.models._base.tiled import TiledAdapter


class InternVLAdapter(TiledAdapter):
    """`InternVLForConditionalGeneration`: InternViT has a CLS token."""

    family: ClassVar[str] = "internvl"
    model_class: ClassVar[str] = "InternVLForConditionalGeneration"
    layers_path: ClassVar[str] = "encoder.layer"
    attention_at: ClassVar[str] = "attention"
    post_norm_path: ClassVar[str | None] = "layernorm"
    projects_per_token: ClassVar[bool] = True

    @cached_property
    def pooling(self) -> int:
        """Patches along a side that become one visual token."""
        return round(1 / float(self.model.config.downsample_ratio))

    def can_leave_early(self, inputs: Mapping[str, Any], needs: Sequence[Signal]) -> bool:
        """Return whether the tower can be left early: not from a layer that the call names."""
        return inputs.get("vision_feature_layer") is None and super().can_leave_early(inputs, needs)

    def visual_tokens(self, patches: Tensor) -> Tensor:
        """Return the visual tokens that are made of some patches: pixel shuffle sees each token as a small image."""
        at_the_end = self.model.config.vision_feature_layer == -1
        patches = self.normed(patches) if at_the_end else patches
        small = rearrange(patches, "tokens (p q) width -> tokens p q width", p=self.pooling)
        shuffled = self.model.base_model.pixel_shuffle(small, scale_factor=self.model.config.downsample_ratio)
        tokens: Tensor = self.projector(rearrange(shuffled, "tokens 1 1 width -> 1 tokens width"))[0]
        return tokens

    @classmethod
    def example(cls) -> Any:
        """Return a tiny InternVL: 2 x 2 tokens a tile, of 4 x 4 patches."""
        torch.manual_seed(0)
        vision = InternVLVisionConfig(**example_tower(image_size=[EXAMPLE_TILE] * 2, patch_size=[14, 14]))
        config = InternVLConfig(
            vision_config=vision, text_config=example_llm(), image_token_id=EXAMPLE_IMAGE, image_seq_length=4
        )
        return with_sharp_attention(InternVLForConditionalGeneration(config))
