"""Pixtral in a LLaVA model, and Mistral 3."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, ClassVar

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.mistral3 import Mistral3Adapter
from tokenprune.models.pixtral import PixtralAdapter
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    EXAMPLE_TOKEN,
    build_llama_config,
    build_pixtral_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.native_resolution import PixtralTowerExample
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


class PixtralExample(PixtralTowerExample):
    """The example of Pixtral."""

    adapter_class: ClassVar[type[Adapter]] = PixtralAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Pixtral."""
        torch.manual_seed(0)
        config = LlavaConfig(
            vision_config=build_pixtral_config(patch_size=EXAMPLE_TOKEN),
            text_config=build_llama_config(),
            image_token_index=EXAMPLE_IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        return with_sharp_attention(LlavaForConditionalGeneration(config))


class Mistral3Example(PixtralTowerExample):
    """The example of Mistral Small 3.1."""

    adapter_class: ClassVar[type[Adapter]] = Mistral3Adapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Mistral 3."""
        torch.manual_seed(0)
        config = Mistral3Config(
            vision_config=build_pixtral_config(patch_size=14),
            text_config=build_llama_config(),
            image_token_index=EXAMPLE_IMAGE,
        )
        return with_sharp_attention(Mistral3ForConditionalGeneration(config))


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
