"""LLaVA-NeXT-Video."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.llava_next_video import LlavaNextVideoAdapter
from tokenprune.testing.examples.configs import EXAMPLE_GRIDS, build_llava_config, with_sharp_attention
from tokenprune.testing.families.base import PATCH, TILE, Family
from tokenprune.testing.families.llava import LlavaNextExample
from tokenprune.testing.tiny_models import PINPOINTS, TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are cut into at most four tiles; each video frame is one tile."""
    square = {"height": TILE, "width": TILE}
    images = LlavaNextImageProcessor(size={"shortest_edge": TILE}, crop_size=square, image_grid_pinpoints=PINPOINTS)
    return LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(size=square, crop_size=square, do_sample_frames=False),
        images,
        tokenizer(image_token="<image>", video_token="<video>"),
        TEMPLATE,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


TOKENS = {"image_token_id": "<image>", "video_token_id": "<video>"}


class LlavaNextVideoExample(LlavaNextExample):
    """The example of LLaVA-NeXT-Video."""

    adapter_class: ClassVar[type[Adapter]] = LlavaNextVideoAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny LLaVA-NeXT-Video."""
        torch.manual_seed(0)
        config = LlavaNextVideoConfig(**build_llava_config(), image_grid_pinpoints=EXAMPLE_GRIDS, video_token_index=4)
        return with_sharp_attention(LlavaNextVideoForConditionalGeneration(config))


FAMILIES = [Family("llava_next_video", LlavaNextVideoAdapter, processor, tokens=TOKENS)]
