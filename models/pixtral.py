"""Pixtral in the LLaVA class: native resolution, one token per patch, a text separator ends each row of an image."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenprune.models._base.native_resolution import PixtralTowerAdapter


class PixtralAdapter(PixtralTowerAdapter):
    """`LlavaForConditionalGeneration` with a Pixtral tower."""

    family: ClassVar[str] = "pixtral"
    model_class: ClassVar[str] = "LlavaForConditionalGeneration"
    passes_output_options: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Return whether the model is LLaVA with a Pixtral tower; other towers encode square tiles."""
        return super().matches(model) and model.config.vision_config.model_type == "pixtral"
