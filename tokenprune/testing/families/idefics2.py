"""Idefics2, with and without splitting images into four parts."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from transformers import Idefics2ImageProcessor, Idefics2Processor

from tokenprune.models.idefics2 import Idefics2Adapter
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

NO_POSITIONS = "a latent of the resampler has no position in the image"
PARTS = "each part of a split image counts as an image"


@cache
def processor(split: bool) -> Any:
    """Return a processor that scales image sides to 28 to 56 pixels and pads the images.

    Args:
        split: whether images are split into four parts.
    """
    special = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}
    images = Idefics2ImageProcessor(do_image_splitting=split, size={"shortest_edge": 28, "longest_edge": 56})
    tok = tokenizer(**special, end_of_utterance="<end_of_utterance>")
    return Idefics2Processor(images, tok, image_seq_len=8, chat_template=TEMPLATE)


FAMILIES = [
    Family(
        name,
        Idefics2Adapter,
        partial(processor, split),
        nested=True,
        skip={
            "test_kept_tokens_show_the_bright_spot": NO_POSITIONS,
            "test_an_exchanged_token_grid_is_noticed": NO_POSITIONS,
            "test_a_saliency_model_sees_the_bright_spot": NO_POSITIONS,
            **({"test_each_row_equals_itself_alone": PARTS, "test_pipeline": PARTS} if split else {}),
        },
    )
    for name, split in (("idefics2", False), ("idefics2, split", True))
]
