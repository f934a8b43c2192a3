"""PaliGemma."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PaliGemmaProcessor, SiglipImageProcessor

from tokenprune.models.paligemma import PaliGemmaAdapter
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


class PaliGemmaFamily(Family):
    """The family of PaliGemma; its processor also returns labels, which are all -100."""

    def inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the processor's output for images and prompts without the labels."""
        batch = super().inputs(*args, **kwargs)
        batch.pop("labels")
        return batch


@cache
def processor() -> Any:
    """Return the processor: images are resized to a square."""
    images = SiglipImageProcessor(size={"height": TILE, "width": TILE}, image_seq_length=16)
    return PaliGemmaProcessor(images, tokenizer(image_token="<image>"), chat_template=TEMPLATE)


FAMILIES = [
    PaliGemmaFamily("paligemma", PaliGemmaAdapter, processor, nested=True, spots=((56, 56), (56, 112)), scale=1.5)
]
