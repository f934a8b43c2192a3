"""LLaVA-1.5: one tile an image, no separators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tokenprune.image import TileGeometry
from tokenprune.models.placeholder import PlaceholderAdapter


class LlavaAdapter(PlaceholderAdapter):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP tower; every image is one base tile."""

    family: ClassVar[str] = "llava"
    model_class: ClassVar[str] = "LlavaForConditionalGeneration"

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Whether the model is LLaVA-1.5; Pixtral towers have no tiles and are another family."""
        return super().matches(model) and model.config.vision_config.model_type != "pixtral"

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one single-tile layout per image."""
        return [TileGeometry.single(self.token_grid)] * len(inputs["pixel_values"])
