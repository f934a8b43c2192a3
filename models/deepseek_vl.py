"""DeepSeek-VL: one tile per image, padded to a square; no newline tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

from tokenprune.models._base.example import EXAMPLE_IMAGE, example_llm, example_siglip, with_sharp_attention
from tokenprune.models._base.single_tile import SingleTileAdapter


class DeepseekVLAdapter(SingleTileAdapter):
    """`DeepseekVLForConditionalGeneration`: a SigLIP tower."""

    family: ClassVar[str] = "deepseek_vl"
    model_class: ClassVar[str] = "DeepseekVLForConditionalGeneration"
    tower_path: ClassVar[str] = "vision_model"
    projector_path: ClassVar[str | None] = "aligner"
    features_by_tile: ClassVar[bool] = True
    post_norm_path: ClassVar[str | None] = "post_layernorm"
    projects_per_token: ClassVar[bool] = True

    @classmethod
    def example(cls) -> Any:
        """Return a tiny DeepSeek-VL."""
        torch.manual_seed(0)
        config = DeepseekVLConfig(
            vision_config=example_siglip(), text_config=example_llm(), image_token_id=EXAMPLE_IMAGE
        )
        return with_sharp_attention(DeepseekVLForConditionalGeneration(config), tower="vision_model")
