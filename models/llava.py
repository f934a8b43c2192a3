"""LLaVA-1.5: one tile an image, no separators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tokenprune.image import TileGeometry
from tokenprune.models.placeholder import (
    EXAMPLE_TILE,
    PlaceholderAdapter,
    example_parts,
    seeded,
    with_sharp_attention,
)


class LlavaAdapter(PlaceholderAdapter):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP tower; every image is one base tile."""

    family: ClassVar[str] = "llava"
    model_class: ClassVar[str] = "LlavaForConditionalGeneration"
    resizable: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Whether the model is LLaVA-1.5; Pixtral towers have no tiles and are another family."""
        return super().matches(model) and model.config.vision_config.model_type != "pixtral"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny LLaVA-1.5."""
        torch.manual_seed(0)
        return with_sharp_attention(LlavaForConditionalGeneration(LlavaConfig(**example_parts())))

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return one tile per picture."""
        tiles = [torch.randn(3, EXAMPLE_TILE, EXAMPLE_TILE, generator=seeded(size)) for size in sizes]
        return {"pixel_values": torch.stack(tiles)}

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one single-tile layout per image."""
        return [TileGeometry.single(self.token_grid)] * len(inputs["pixel_values"])
