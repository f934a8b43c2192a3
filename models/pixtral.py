"""Pixtral in the LLaVA class: native resolution, one token per patch, a text separator ends each row of an image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tokenprune.models._base.example import EXAMPLE_IMAGE, example_llm, with_sharp_attention
from tokenprune.models._base.native_resolution import EXAMPLE_TOKEN, PixtralTowerAdapter, example_pixtral


class PixtralAdapter(PixtralTowerAdapter):
    """`LlavaForConditionalGeneration` with a Pixtral tower."""

    family: ClassVar[str] = "pixtral"
    model_class: ClassVar[str] = "LlavaForConditionalGeneration"
    passes_output_options: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Return whether the model is LLaVA with a Pixtral tower; other towers encode square tiles."""
        return super().matches(model) and model.config.vision_config.model_type == "pixtral"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Pixtral."""
        torch.manual_seed(0)
        config = LlavaConfig(
            vision_config=example_pixtral(patch_size=EXAMPLE_TOKEN),
            text_config=example_llm(),
            image_token_index=EXAMPLE_IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        return with_sharp_attention(LlavaForConditionalGeneration(config))
