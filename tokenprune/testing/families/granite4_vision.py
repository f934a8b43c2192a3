"""Granite 4 Vision."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import Granite4VisionProcessor, LlavaNextImageProcessor

from tokenprune.models.granite4_vision import Granite4VisionAdapter
from tokenprune.testing.families.base import PATCH, TILE, Family
from tokenprune.testing.tiny_models import PINPOINTS, TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are cut into at most four tiles of 2 x 2 tokens."""
    square = {"height": TILE, "width": TILE}
    images = LlavaNextImageProcessor(size=square, crop_size=square, image_grid_pinpoints=PINPOINTS)
    return Granite4VisionProcessor(
        images,
        tokenizer(image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        downsample_rate="1/2",
    )


FAMILIES = [
    Family(
        "granite4_vision",
        Granite4VisionAdapter,
        processor,
        skip={
            "chunked prefill": "the unmodified model fails: transformers slices pooler_output, which its output lacks"
        },
    )
]
