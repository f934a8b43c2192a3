"""LLaVA-NeXT-Video."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

from tokenprune.models.llava_next_video import LlavaNextVideoAdapter
from tokenprune.testing.families.base import PATCH, TILE, Family
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
FAMILIES = [Family("llava_next_video", LlavaNextVideoAdapter, processor, tokens=TOKENS)]
