"""LFM2-VL."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import Lfm2VlForConditionalGeneration, Lfm2VlImageProcessor, Lfm2VlProcessor

from tokenprune.models._base.example import with_sharp_attention
from tokenprune.models.lfm2_vl import Lfm2VlAdapter
from tokenprune.testing.families.base import PATCH, TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

SPECIAL = {f"tile_{row}_{col}": f"<|img_row_{row}_col_{col}|>" for row in range(1, 5) for col in range(1, 5)}


@cache
def processor() -> Any:
    """Return the processor.

    Large images are cut into at most four tiles. Small images and the base tile keep their aspect ratio.
    """
    images = Lfm2VlImageProcessor(
        encoder_patch_size=PATCH,
        tile_size=TILE,
        max_tiles=4,
        min_image_tokens=6,
        max_image_tokens=8,
        max_pixels_tolerance=1.0,
    )
    tok = tokenizer(
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
        **SPECIAL,
    )
    return Lfm2VlProcessor(images, tok, chat_template=TEMPLATE)


def without_convolutions() -> Any:
    """Return a model with attention in every layer of its LLM, so that dropping a token equals masking it."""
    config = Lfm2VlAdapter.example().config
    config.text_config.layer_types = ["full_attention", "full_attention"]
    torch.manual_seed(0)
    return with_sharp_attention(Lfm2VlForConditionalGeneration(config))


FAMILIES = [
    Family(
        "lfm2_vl",
        Lfm2VlAdapter,
        processor,
        nested=True,
        oracle=None,
        why="convolutions in the language model read adjacent tokens, and a masked token remains adjacent",
        spots=((168, 168),),
    ),
    Family(
        "lfm2_vl_attention",
        Lfm2VlAdapter,
        processor,
        example=without_convolutions,
        nested=True,
        spots=((168, 168),),
    ),
]
