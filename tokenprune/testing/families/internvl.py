"""InternVL."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

from tokenprune.models.internvl import InternVLAdapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are cut into at most six tiles."""
    tok = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    images = GotOcr2ImageProcessor(
        size={"height": TILE, "width": TILE}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    return InternVLProcessor(images, tok, InternVLVideoProcessor(), image_seq_length=4, chat_template=TEMPLATE)


FAMILIES = [
    Family(
        "internvl",
        InternVLAdapter,
        processor,
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        image="<IMG_CONTEXT>",
        spots=((112, 112), (56, 112), (168, 56)),
    )
]
