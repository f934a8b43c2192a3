"""InternVL: sub-images in row-major order, the thumbnail last; four patches become one token."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from tokenprune.models.example import EXAMPLE_IMAGE, EXAMPLE_TILE, example_llm, example_tower, with_sharp_attention
from tokenprune.models.tiles import TiledAdapter


class InternVLAdapter(TiledAdapter):
    """`InternVLForConditionalGeneration`: InternViT has a CLS token."""

    family: ClassVar[str] = "internvl"
    model_class: ClassVar[str] = "InternVLForConditionalGeneration"
    layers_at: ClassVar[str] = "encoder.layer"
    attention_at: ClassVar[str] = "attention"

    @cached_property
    def pooling(self) -> int:
        """Patches along a side that become one visual token."""
        return round(1 / float(self.model.config.downsample_ratio))

    @classmethod
    def example(cls) -> Any:
        """Return a tiny InternVL: 2 x 2 tokens a tile, of 4 x 4 patches."""
        torch.manual_seed(0)
        vision = InternVLVisionConfig(**example_tower(image_size=[EXAMPLE_TILE] * 2, patch_size=[14, 14]))
        config = InternVLConfig(
            vision_config=vision, text_config=example_llm(), image_token_id=EXAMPLE_IMAGE, image_seq_length=4
        )
        return with_sharp_attention(InternVLForConditionalGeneration(config))
