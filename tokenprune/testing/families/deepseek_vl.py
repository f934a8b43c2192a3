"""DeepSeek-VL."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import DeepseekVLImageProcessor, DeepseekVLProcessor

from tokenprune.models.deepseek_vl import DeepseekVLAdapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are padded to a square."""
    images = DeepseekVLImageProcessor(size={"height": TILE, "width": TILE})
    return DeepseekVLProcessor(images, tokenizer(image_token="<image>"), TEMPLATE, num_image_tokens=16)


FAMILIES = [Family("deepseek_vl", DeepseekVLAdapter, processor, spots=((56, 56), (112, 112)))]
