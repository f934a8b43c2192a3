"""Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

from tests.helpers.families.qwen2_vl import FAMILIES as QWEN2
from tests.helpers.families.qwen2_vl import images, special
from tests.helpers.tiny import TEMPLATE, tokenizer
from tokenprune.models.qwen2_5_vl import Qwen25VLAdapter


@cache
def processor() -> Any:
    """Images keep their size, rounded to whole tokens of 28 pixels."""
    return Qwen2_5_VLProcessor(images(), tokenizer(**special()), Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


FAMILIES = [replace(QWEN2[0], name="qwen2_5_vl", adapter=Qwen25VLAdapter, processor=processor)]
