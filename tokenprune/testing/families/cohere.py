"""Aya Vision and Command A Vision."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AyaVisionProcessor, Cohere2VisionImageProcessor, Cohere2VisionProcessor, GotOcr2ImageProcessor

from tokenprune.models.aya_vision import AyaVisionAdapter
from tokenprune.models.cohere2_vision import Cohere2VisionAdapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

SIZES = {"size": {"height": TILE, "width": TILE}, "crop_to_patches": True, "min_patches": 1, "max_patches": 6}
SPECIAL = {
    "image_token": "<|IMG_PATCH|>",
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}
SPOTS = ((112, 112), (56, 112), (168, 56))


@cache
def aya_vision() -> Any:
    """Return the processor of Aya Vision: images are cut into at most six tiles."""
    images = GotOcr2ImageProcessor(**SIZES)
    special = tokenizer(**SPECIAL, placeholder="<image>")
    return AyaVisionProcessor(
        images, special, patch_size=14, img_size=TILE, downsample_factor=2, chat_template=TEMPLATE
    )


@cache
def cohere2_vision() -> Any:
    """Return the processor of Command A Vision: images are cut into at most six tiles.

    Its `patch_size` is the number of tokens along a side of a tile.
    """
    images = Cohere2VisionImageProcessor(**SIZES, patch_size=2)
    return Cohere2VisionProcessor(images, tokenizer(**SPECIAL), chat_template=TEMPLATE)


FAMILIES = [
    Family("aya_vision", AyaVisionAdapter, aya_vision, {"image_token_id": "<|IMG_PATCH|>"}, spots=SPOTS),
    Family(
        "cohere2_vision",
        Cohere2VisionAdapter,
        cohere2_vision,
        {"image_token_id": "<|IMG_PATCH|>"},
        image="<|IMG_PATCH|>",
        spots=SPOTS,
    ),
]
