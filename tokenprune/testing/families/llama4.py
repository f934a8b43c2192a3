"""Llama 4."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import Llama4ImageProcessor, Llama4Processor

from tokenprune.models.llama4 import Llama4Adapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

SPECIAL = {
    "image_token": "<|image|>",
    "patch_token": "<|patch|>",
    "boi_token": "<|image_start|>",
    "eoi_token": "<|image_end|>",
    "column_token": "<|tile_x_separator|>",
    "row_token": "<|tile_y_separator|>",
}


@cache
def processor() -> Any:
    """Return the processor: images are put on a canvas of at most six tiles."""
    images = Llama4ImageProcessor(size={"height": TILE, "width": TILE}, max_patches=6)
    template = TEMPLATE.replace("<image>", "<|image|>")
    return Llama4Processor(images, tokenizer(**SPECIAL), patch_size=14, chat_template=template)


FAMILIES = [
    Family(
        "llama4",
        Llama4Adapter,
        processor,
        tokens={
            "image_token_index": "<|patch|>",
            "boi_token_index": "<|image_start|>",
            "eoi_token_index": "<|image_end|>",
        },
        image="<|image|>",
        beams=False,
        why="the unmodified model cannot repeat its images for beams",
        skip={"chunked prefill": "the unmodified model cannot cut its images for chunks"},
    )
]
