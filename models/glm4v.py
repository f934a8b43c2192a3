"""GLM-4.1V: native resolution; a convolution merges 2 x 2 patches into one token; M-RoPE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from tokenprune.models._base.example import EXAMPLE_IMAGE, with_sharp_attention
from tokenprune.models._base.native_resolution import MergedPatchesAdapter, example_mrope_llm


class Glm4vAdapter(MergedPatchesAdapter):
    """`Glm4vForConditionalGeneration`."""

    family: ClassVar[str] = "glm4v"
    model_class: ClassVar[str] = "Glm4vForConditionalGeneration"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny GLM-4.1V."""
        torch.manual_seed(0)
        config = Glm4vConfig(
            vision_config={
                "depth": 4,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "image_size": 56,
                "patch_size": 14,
            },
            text_config=example_mrope_llm(),
            image_token_id=EXAMPLE_IMAGE,
            video_token_id=4,
            image_start_token_id=10,
            image_end_token_id=11,
            video_start_token_id=12,
            video_end_token_id=13,
        )
        return with_sharp_attention(Glm4vForConditionalGeneration(config), tower="visual")
