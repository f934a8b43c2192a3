"""Ovis2."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import Ovis2ImageProcessor, Ovis2Processor

from tokenprune.models.ovis2 import Ovis2Adapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

INDICATORS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]


@cache
def processor() -> Any:
    """Return the processor: images are cut into at most six tiles."""
    special = {f"mark_{number}": token for number, token in enumerate(INDICATORS)}
    tok = tokenizer(image_token="<IMG_ATOM>", text_image="<image>", **special)
    images = Ovis2ImageProcessor(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=6)
    return Ovis2Processor(images, tok, image_seq_length=4, chat_template=TEMPLATE)


FAMILIES = [
    Family(
        "ovis2",
        Ovis2Adapter,
        processor,
        tokens={"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": INDICATORS},
        skip={
            "chunked prefill": "the unmodified model loses the features of its visual indicator tokens between chunks"
        },
    )
]
