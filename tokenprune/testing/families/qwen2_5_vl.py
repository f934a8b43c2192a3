"""Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.qwen2_5_vl import Qwen25VLAdapter
from tokenprune.testing.examples.configs import MROPE_IDS, build_mrope_config, with_sharp_attention
from tokenprune.testing.examples.native_resolution import MergedPatchesExample
from tokenprune.testing.families.qwen2_vl import FAMILIES as QWEN2
from tokenprune.testing.families.qwen2_vl import images, special
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: image sizes are rounded to whole tokens of 28 pixels."""
    return Qwen2_5_VLProcessor(images(), tokenizer(**special()), Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


class Qwen25VLExample(MergedPatchesExample):
    """The example of Qwen2.5-VL."""

    adapter_class: ClassVar[type[Adapter]] = Qwen25VLAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Qwen2.5-VL: windows of 2 x 2 tokens, and two of four layers that attend to the full image."""
        torch.manual_seed(0)
        vision = {"depth": 4, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
        config = Qwen2_5_VLConfig(
            vision_config={**vision, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [0, 2]},
            text_config=build_mrope_config(),
            **MROPE_IDS,
        )
        return with_sharp_attention(Qwen2_5_VLForConditionalGeneration(config), tower="visual")


FAMILIES = [replace(QWEN2[0], name="qwen2_5_vl", adapter=Qwen25VLAdapter, processor=processor)]
