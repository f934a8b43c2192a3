"""Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

from tokenprune.models.qwen2_5_vl import Qwen25VLAdapter
from tokenprune.testing.families.qwen2_vl import FAMILIES as QWEN2
from tokenprune.testing.families.qwen2_vl import images, special
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: image sizes are rounded to whole tokens of 28 pixels."""
    return Qwen2_5_VLProcessor(images(), tokenizer(**special()), Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


FAMILIES = [replace(QWEN2[0], name="qwen2_5_vl", adapter=Qwen25VLAdapter, processor=processor)]
