"""PerceptionLM."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PerceptionLMImageProcessor, PerceptionLMProcessor, PerceptionLMVideoProcessor

from tokenprune.models.perception_lm import PerceptionLMAdapter
from tokenprune.testing.families.base import PATCH, TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are cut into at most four tiles, and the base tile is added."""
    return PerceptionLMProcessor(
        PerceptionLMVideoProcessor(),
        PerceptionLMImageProcessor(tile_size=TILE, max_num_tiles=4, vision_input_type="thumb+tile"),
        tokenizer(image_token="<image>", video_token="<video>"),
        patch_size=PATCH,
        pooling_ratio=2,
        chat_template=TEMPLATE,
    )


FAMILIES = [
    Family(
        "perception_lm",
        PerceptionLMAdapter,
        processor,
        tokens={"image_token_id": "<image>", "video_token_id": "<video>"},
        sizes=((112, 112), (56, 224), (220, 50), (50, 200)),  # four tiles each: the pixels of a batch are one tensor
        spots=((112, 112), (56, 224), (224, 56)),
    )
]
