"""Gemma 3."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from transformers import Gemma3ImageProcessor, Gemma3Processor

from tokenprune.models.gemma3 import Gemma3Adapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


class PanAndScan(Gemma3Processor):
    """The processor with pan and scan, which is off by default, for small images."""

    images_kwargs: ClassVar[dict[str, Any]] = {  # type: ignore[assignment, misc]
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 32,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }


@cache
def processor() -> Any:
    """Return the processor: images of an aspect ratio of 2 or more are cut into two to four crops."""
    images = Gemma3ImageProcessor(size={"height": TILE, "width": TILE})
    tok = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    return PanAndScan(images, tok, image_seq_length=16, chat_template=TEMPLATE.replace("<image>", "<start_of_image>"))


FAMILIES = [
    Family(
        "gemma3",
        Gemma3Adapter,
        processor,
        tokens={
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        image="<start_of_image>",
        nested=True,
        spots=((56, 56), (56, 112), (168, 56)),
        skip={
            "chunked prefill": "a chunk that ends inside an image changes its attention, also in the unmodified model"
        },
    )
]
