"""Pixtral in a LLaVA model, and Mistral 3."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from transformers import PixtralImageProcessor, PixtralProcessor

from tokenprune.models.mistral3 import Mistral3Adapter
from tokenprune.models.pixtral import PixtralAdapter
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor(patch_size: int, merge: int) -> Any:
    """Return a processor that keeps image sizes, rounded up to whole tokens of 28 pixels.

    Args:
        patch_size: side of a patch in pixels.
        merge: number of patches along a side of a token.
    """
    tok = tokenizer(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    images = PixtralImageProcessor(size={"longest_edge": 224}, patch_size=patch_size)
    return PixtralProcessor(images, tok, patch_size=patch_size, spatial_merge_size=merge, chat_template=TEMPLATE)


FAMILIES = [
    Family(
        name,
        adapter,
        partial(processor, patch_size, merge),
        tokens={"image_token_id": "[IMG]"},
        image="[IMG]",
        spots=((112, 112), (56, 140), (140, 56)),
    )
    for name, adapter, patch_size, merge in (("pixtral", PixtralAdapter, 28, 1), ("mistral3", Mistral3Adapter, 14, 2))
]
