"""DeepSeek-VL."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import DeepseekVLImageProcessor, DeepseekVLProcessor

from tests.helpers.families.base import TILE, Family
from tests.helpers.tiny import TEMPLATE, tokenizer
from tokenprune.models.deepseek_vl import DeepseekVLAdapter


@cache
def processor() -> Any:
    """Images are padded to a square."""
    images = DeepseekVLImageProcessor(size={"height": TILE, "width": TILE})
    return DeepseekVLProcessor(images, tokenizer(image_token="<image>"), TEMPLATE, num_image_tokens=16)


FAMILIES = [Family("deepseek_vl", DeepseekVLAdapter, processor, spots=((56, 56), (112, 112)))]
