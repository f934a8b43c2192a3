"""InternVL."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
)

from tokenprune.adapter import Adapter
from tokenprune.models.internvl import InternVLAdapter
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    EXAMPLE_TILE,
    build_llama_config,
    build_tower_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.tiled import TiledExample
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are cut into at most six tiles."""
    tok = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    images = GotOcr2ImageProcessor(
        size={"height": TILE, "width": TILE}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    return InternVLProcessor(images, tok, InternVLVideoProcessor(), image_seq_length=4, chat_template=TEMPLATE)


class InternVLExample(TiledExample):
    """The example of InternVL: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = InternVLAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny InternVL."""
        torch.manual_seed(0)
        vision = InternVLVisionConfig(**build_tower_config(image_size=[EXAMPLE_TILE] * 2, patch_size=[14, 14]))
        config = InternVLConfig(
            vision_config=vision, text_config=build_llama_config(), image_token_id=EXAMPLE_IMAGE, image_seq_length=4
        )
        return with_sharp_attention(InternVLForConditionalGeneration(config))


FAMILIES = [
    Family(
        "internvl",
        InternVLAdapter,
        processor,
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        image="<IMG_CONTEXT>",
        spots=((112, 112), (56, 112), (168, 56)),
    )
]
