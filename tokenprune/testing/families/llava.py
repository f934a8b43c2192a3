"""LLaVA-1.5, LLaVA-NeXT, and LLaVA-NeXT as Granite Vision 3 uses it: a SigLIP tower and features of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration

from tokenprune.adapter import Adapter
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.testing.examples.base import PlaceholderExample, Size, seed_pixels
from tokenprune.testing.examples.configs import (
    EXAMPLE_GRIDS,
    EXAMPLE_TILE,
    build_llava_config,
    build_siglip_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.single_tile import SingleTileExample
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import tiny_processor


class LlavaExample(SingleTileExample):
    """The example of LLaVA-1.5."""

    adapter_class: ClassVar[type[Adapter]] = LlavaAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny LLaVA-1.5."""
        torch.manual_seed(0)
        return with_sharp_attention(LlavaForConditionalGeneration(LlavaConfig(**build_llava_config())))


class LlavaNextExample(PlaceholderExample):
    """The example of LLaVA-NeXT."""

    adapter_class: ClassVar[type[Adapter]] = LlavaNextAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny LLaVA-NeXT."""
        torch.manual_seed(0)
        config = LlavaNextConfig(**build_llava_config(), image_grid_pinpoints=EXAMPLE_GRIDS)
        return with_sharp_attention(LlavaNextForConditionalGeneration(config))

    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the pixels of all images, each padded to the largest number of tiles."""
        numbers = [self.adapter.layout(size).tiles for size in sizes]
        pixels = torch.zeros(len(sizes), max(numbers), 3, EXAMPLE_TILE, EXAMPLE_TILE)
        for image, size, number in zip(pixels, sizes, numbers, strict=True):
            image[:number] = torch.randn(number, *image.shape[1:], generator=seed_pixels(size))
        return {self.adapter.pixels: pixels, "image_sizes": torch.tensor(sizes)}


def granite_vision() -> Any:
    """Return a tiny LLaVA-NeXT with the architecture of Granite Vision 3: a SigLIP tower and several feature layers."""
    torch.manual_seed(0)
    config = LlavaNextConfig(
        **{**build_llava_config(), "vision_config": build_siglip_config()},
        image_grid_pinpoints=EXAMPLE_GRIDS,
        vision_feature_layer=[-3, -2, -1],
        vision_feature_select_strategy="full",
    )
    return with_sharp_attention(LlavaNextForConditionalGeneration(config))


FAMILIES = [
    Family("llava", LlavaAdapter, partial(tiny_processor, "llava"), spots=((56, 56),)),
    Family("llava_next", LlavaNextAdapter, partial(tiny_processor, "llava_next")),
    Family(
        "llava_next (Granite Vision 3)",
        LlavaNextAdapter,
        partial(tiny_processor, "llava_next", "siglip"),
        example=granite_vision,
    ),
]
