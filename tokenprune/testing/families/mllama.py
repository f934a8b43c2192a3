"""The tiny Llama 3.2 Vision model."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import MllamaImageProcessorPil, MllamaProcessor

from tokenprune.models.mllama import MllamaAdapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are put on a canvas of at most four tiles."""
    tok = tokenizer(image_token="<|image|>", python_token="<|python_tag|>")
    images = MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=4)
    return MllamaProcessor(images, tok, chat_template=TEMPLATE)


FAMILY = Family(
    "mllama", MllamaAdapter, processor, {"image_token_index": "<|image|>"}, image="<|image|>", nested=True, scale=1.5
)
FAMILIES = [FAMILY]
