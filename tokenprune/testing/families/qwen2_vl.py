"""Qwen2-VL."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from tokenprune.models.qwen2_vl import Qwen2VLAdapter
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def images() -> Any:
    """Return an image processor that rounds image sizes to whole tokens of 28 pixels."""
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    return Qwen2VLImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2, size=size)


def special() -> dict[str, str]:
    """Return the special tokens by their attribute names."""
    return {name.removesuffix("_id"): token for name, token in TOKENS.items()}


@cache
def processor() -> Any:
    """Return the processor of Qwen2-VL."""
    return Qwen2VLProcessor(images(), tokenizer(**special()), Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


FAMILIES = [
    Family(
        "qwen2_vl",
        Qwen2VLAdapter,
        processor,
        tokens=TOKENS,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        spots=((112, 112), (56, 140), (140, 56)),
    )
]
