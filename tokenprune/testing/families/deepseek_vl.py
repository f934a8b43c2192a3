"""DeepSeek-VL."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.deepseek_vl import DeepseekVLAdapter
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    build_llama_config,
    build_siglip_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.single_tile import SingleTileExample
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are padded to a square."""
    images = DeepseekVLImageProcessor(size={"height": TILE, "width": TILE})
    return DeepseekVLProcessor(images, tokenizer(image_token="<image>"), TEMPLATE, num_image_tokens=16)


class DeepseekVLExample(SingleTileExample):
    """The example of DeepSeek-VL."""

    adapter_class: ClassVar[type[Adapter]] = DeepseekVLAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny DeepSeek-VL."""
        torch.manual_seed(0)
        config = DeepseekVLConfig(
            vision_config=build_siglip_config(), text_config=build_llama_config(), image_token_id=EXAMPLE_IMAGE
        )
        return with_sharp_attention(DeepseekVLForConditionalGeneration(config), tower="vision_model")


FAMILIES = [Family("deepseek_vl", DeepseekVLAdapter, processor, spots=((56, 56), (112, 112)))]
