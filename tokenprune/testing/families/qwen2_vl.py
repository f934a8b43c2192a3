"""Qwen2-VL."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.qwen2_vl import Qwen2VLAdapter
from tokenprune.testing.examples.configs import MROPE_IDS, build_mrope_config, with_sharp_attention
from tokenprune.testing.examples.native_resolution import MergedPatchesExample
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


class Qwen2VLExample(MergedPatchesExample):
    """The example of Qwen2-VL."""

    adapter_class: ClassVar[type[Adapter]] = Qwen2VLAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Qwen2-VL."""
        torch.manual_seed(0)
        config = Qwen2VLConfig(
            vision_config={"depth": 4, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
            text_config=build_mrope_config(),
            **MROPE_IDS,
        )
        return with_sharp_attention(Qwen2VLForConditionalGeneration(config), tower="visual")


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
