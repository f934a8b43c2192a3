"""LLaVA-OneVision."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

from tokenprune.models.llava_onevision import LlavaOnevisionAdapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import PINPOINTS, TEMPLATE, tokenizer

TOKENS = {"image_token_id": "<image>", "video_token_id": "<video>"}


@cache
def processor() -> Any:
    """Return the processor.

    If a prompt row has one image, it is cut into at most four tiles. Several images of a row are not cut.
    """
    square = {"height": TILE, "width": TILE}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINPOINTS),
        tokenizer(image_token="<image>", video_token="<video>"),
        LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        vision_aspect_ratio="anyres_max_2",
    )


FAMILIES = [
    Family(
        "llava_onevision",
        LlavaOnevisionAdapter,
        processor,
        tokens=TOKENS,
        nested=True,
        # the model shrinks no canvas of these sizes; tests/models/test_onevision.py tests shrunk canvases
        spots=((56, 112), (112, 56)),
    )
]
