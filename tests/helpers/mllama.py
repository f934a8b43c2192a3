"""The tiny Llama 3.2 Vision model."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import MllamaImageProcessorPil, MllamaProcessor

from tests.helpers.families.base import TILE, Family
from tests.helpers.tiny import TEMPLATE, tokenizer
from tokenprune.models.mllama import MllamaAdapter


@cache
def processor() -> Any:
    """Images are put on a canvas of at most four tiles."""
    tok = tokenizer(image_token="<|image|>", python_token="<|python_tag|>")
    images = MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=4)
    return MllamaProcessor(images, tok, chat_template=TEMPLATE)


FAMILY = Family(
    "mllama", MllamaAdapter, processor, {"image_token_index": "<|image|>"}, image="<|image|>", nested=True, scale=1.5
)
