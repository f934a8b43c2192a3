"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; frames of videos in the same call are not reduced."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from tokenprune.models._base.example import example_parts, with_sharp_attention
from tokenprune.models.llava_next import EXAMPLE_GRIDS, LlavaNextAdapter


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """`LlavaNextVideoForConditionalGeneration`: images, with or without videos."""

    family: ClassVar[str] = "llava_next_video"
    model_class: ClassVar[str] = "LlavaNextVideoForConditionalGeneration"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny LLaVA-NeXT-Video."""
        torch.manual_seed(0)
        config = LlavaNextVideoConfig(**example_parts(), image_grid_pinpoints=EXAMPLE_GRIDS, video_token_index=4)
        return with_sharp_attention(LlavaNextVideoForConditionalGeneration(config))
