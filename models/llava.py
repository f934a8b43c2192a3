"""LLaVA-1.5: one tile per image, no newline tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenprune.models._base.compilable import CompilableAdapter
from tokenprune.models._base.single_tile import SingleTileAdapter


class LlavaAdapter(SingleTileAdapter, CompilableAdapter):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP tower; every image is one base tile."""

    family: ClassVar[str] = "llava"
    model_class: ClassVar[str] = "LlavaForConditionalGeneration"
    resizable: ClassVar[bool] = True
    passes_output_options: ClassVar[bool] = True
    supports_image_embeds: ClassVar[bool] = True
    projects_per_token: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Return whether the model is LLaVA-1.5; models with a Pixtral tower belong to another family."""
        return super().matches(model) and model.config.vision_config.model_type != "pixtral"
