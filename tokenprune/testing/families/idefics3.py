"""Idefics3 and SmolVLM."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import (
    Idefics3ImageProcessor,
    Idefics3Processor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tokenprune.models.idefics3 import Idefics3Adapter, SmolVLMAdapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

SPECIAL = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"row_{row}_col_{col}": f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)},
}
SIZES = {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}}


@cache
def idefics3() -> Any:
    """Return the processor of Idefics3: images are scaled to a longer side of three tiles and cut into tiles."""
    images = Idefics3ImageProcessor(do_image_splitting=True, **SIZES)
    return Idefics3Processor(images, tokenizer(**SPECIAL), image_seq_len=4, chat_template=TEMPLATE)


@cache
def smolvlm() -> Any:
    """Return the processor of SmolVLM: images are cut as in Idefics3."""
    images = SmolVLMImageProcessor(do_image_splitting=True, **SIZES)
    video = SmolVLMVideoProcessor()
    return SmolVLMProcessor(images, tokenizer(**SPECIAL), video, image_seq_len=4, chat_template=TEMPLATE)


FAMILIES = [
    Family("idefics3", Idefics3Adapter, idefics3, nested=True, spots=((168, 168), (56, 168), (168, 112))),
    Family("smolvlm", SmolVLMAdapter, smolvlm, nested=True, spots=((168, 168), (56, 168), (168, 112))),
]
