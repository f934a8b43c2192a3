"""Qwen2-VL: native resolution, 2 x 2 patches become one token, M-RoPE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tokenprune.models._base.example import with_sharp_attention
from tokenprune.models._base.native_resolution import EXAMPLE_IDS, MergedPatchesAdapter, example_mrope_llm


class Qwen2VLAdapter(MergedPatchesAdapter):
    """`Qwen2VLForConditionalGeneration`."""

    family: ClassVar[str] = "qwen2_vl"
    model_class: ClassVar[str] = "Qwen2VLForConditionalGeneration"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Qwen2-VL."""
        torch.manual_seed(0)
        config = Qwen2VLConfig(
            vision_config={"depth": 4, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
            text_config=example_mrope_llm(),
            **EXAMPLE_IDS,
        )
        return with_sharp_attention(Qwen2VLForConditionalGeneration(config), tower="visual")
