"""Qwen3-VL."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

from tokenprune.models.qwen3_vl import Qwen3VLAdapter
from tokenprune.testing.families.qwen2_vl import FAMILIES as QWEN2
from tokenprune.testing.families.qwen2_vl import images, special
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: image sizes are rounded to whole tokens of 28 pixels."""
    return Qwen3VLProcessor(images(), tokenizer(**special()), Qwen3VLVideoProcessor(), chat_template=TEMPLATE)


FAMILIES = [replace(QWEN2[0], name="qwen3_vl", adapter=Qwen3VLAdapter, processor=processor)]
