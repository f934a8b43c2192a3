"""Qwen3-VL."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

from tokenprune.adapter import Adapter
from tokenprune.models.qwen3_vl import Qwen3VLAdapter
from tokenprune.testing.examples.configs import MROPE_IDS, build_mrope_config, with_sharp_attention
from tokenprune.testing.examples.native_resolution import MergedPatchesExample
from tokenprune.testing.families.qwen2_vl import FAMILIES as QWEN2
from tokenprune.testing.families.qwen2_vl import images, special
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: image sizes are rounded to whole tokens of 28 pixels."""
    return Qwen3VLProcessor(images(), tokenizer(**special()), Qwen3VLVideoProcessor(), chat_template=TEMPLATE)


class Qwen3VLExample(MergedPatchesExample):
    """The example of Qwen3-VL."""

    adapter_class: ClassVar[type[Adapter]] = Qwen3VLAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Qwen3-VL with features of two layers added in the LLM."""
        torch.manual_seed(0)
        vision = {"depth": 4, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
        config = Qwen3VLConfig(
            vision_config={
                **vision,
                "patch_size": 14,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 2],
            },
            text_config=build_mrope_config(head_dim=8),
            **MROPE_IDS,
        )
        return with_sharp_attention(Qwen3VLForConditionalGeneration(config), tower="visual")


FAMILIES = [replace(QWEN2[0], name="qwen3_vl", adapter=Qwen3VLAdapter, processor=processor)]
