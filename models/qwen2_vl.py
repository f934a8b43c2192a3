"""Qwen2-VL: native resolution, 2 x 2 patches become one token, M-RoPE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tokenprune.models.native import MergedPatchesAdapter
from tokenprune.models.placeholder import EXAMPLE_IMAGE, EXAMPLE_PAD, with_sharp_attention


class Qwen2VLAdapter(MergedPatchesAdapter):
    """`Qwen2VLForConditionalGeneration`."""

    family: ClassVar[str] = "qwen2_vl"
    model_class: ClassVar[str] = "Qwen2VLForConditionalGeneration"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Qwen2-VL."""
        torch.manual_seed(0)
        config = Qwen2VLConfig(
            vision_config={"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14},
            text_config={
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "pad_token_id": EXAMPLE_PAD,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            },
            image_token_id=EXAMPLE_IMAGE,
            video_token_id=4,
            vision_start_token_id=10,
            vision_end_token_id=11,
        )
        return with_sharp_attention(Qwen2VLForConditionalGeneration(config), tower="visual")
