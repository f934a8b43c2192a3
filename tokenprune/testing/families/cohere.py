"""Aya Vision and Command A Vision."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    GotOcr2ImageProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.aya_vision import AyaVisionAdapter
from tokenprune.models.cohere2_vision import Cohere2VisionAdapter
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    build_llama_config,
    build_siglip_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.tiled import TiledExample
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

SIZES: dict[str, Any] = {
    "size": {"height": TILE, "width": TILE},
    "crop_to_patches": True,
    "min_patches": 1,
    "max_patches": 6,
}
SPECIAL = {
    "image_token": "<|IMG_PATCH|>",
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}
SPOTS = ((112, 112), (56, 112), (168, 56))


@cache
def aya_vision() -> Any:
    """Return the processor of Aya Vision: images are cut into at most six tiles."""
    images = GotOcr2ImageProcessor(**SIZES)
    special = tokenizer(**SPECIAL, placeholder="<image>")
    return AyaVisionProcessor(
        images, special, patch_size=14, img_size=TILE, downsample_factor=2, chat_template=TEMPLATE
    )


@cache
def cohere2_vision() -> Any:
    """Return the processor of Command A Vision: images are cut into at most six tiles.

    Its `patch_size` is the number of tokens along a side of a tile.
    """
    images = Cohere2VisionImageProcessor(**SIZES, patch_size=2)  # type: ignore[call-arg]  # transformers accepts it
    return Cohere2VisionProcessor(images, tokenizer(**SPECIAL), chat_template=TEMPLATE)


class AyaVisionExample(TiledExample):
    """The example of Aya Vision: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = AyaVisionAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Aya Vision."""
        torch.manual_seed(0)
        config = AyaVisionConfig(
            vision_config=build_siglip_config(), text_config=build_llama_config(), image_token_index=EXAMPLE_IMAGE
        )
        return with_sharp_attention(AyaVisionForConditionalGeneration(config))


class Cohere2VisionExample(TiledExample):
    """The example of Command A Vision: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = Cohere2VisionAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Command A Vision."""
        torch.manual_seed(0)
        config = Cohere2VisionConfig(
            vision_config=build_siglip_config(),
            text_config=build_llama_config(),
            image_token_id=EXAMPLE_IMAGE,
            alignment_intermediate_size=64,
        )
        return with_sharp_attention(Cohere2VisionForConditionalGeneration(config))


FAMILIES = [
    Family("aya_vision", AyaVisionAdapter, aya_vision, {"image_token_id": "<|IMG_PATCH|>"}, spots=SPOTS),
    Family(
        "cohere2_vision",
        Cohere2VisionAdapter,
        cohere2_vision,
        {"image_token_id": "<|IMG_PATCH|>"},
        image="<|IMG_PATCH|>",
        spots=SPOTS,
    ),
]
