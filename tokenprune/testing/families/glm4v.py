"""GLM-4.1V."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

from tokenprune.models.glm4v import Glm4vAdapter
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

TOKENS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}


@cache
def processor() -> Any:
    """Return the processor: image sizes are rounded to whole tokens of 28 pixels."""
    special = {name.removesuffix("_id"): token for name, token in TOKENS.items()}
    images = Glm4vImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 128})
    return Glm4vProcessor(images, tokenizer(**special), Glm4vVideoProcessor(), chat_template=TEMPLATE)


FAMILIES = [
    Family(
        "glm4v",
        Glm4vAdapter,
        processor,
        tokens=TOKENS,
        image="<|begin_of_image|><|image|><|end_of_image|>",
        spots=((112, 112), (56, 140), (140, 56)),
    )
]
