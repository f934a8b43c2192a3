"""Aya Vision: sub-images in row-major order, each after its name as text, the whole picture last."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

from tokenprune.models.example import EXAMPLE_IMAGE, example_llm, example_siglip, with_sharp_attention
from tokenprune.models.tiles import TiledAdapter
from tokenprune.rewrite import TextSeparatorSide


class AyaVisionAdapter(TiledAdapter):
    """`AyaVisionForConditionalGeneration`: 2 x 2 patches of SigLIP become one token."""

    family: ClassVar[str] = "aya_vision"
    model_class: ClassVar[str] = "AyaVisionForConditionalGeneration"
    text_separator_side: ClassVar[TextSeparatorSide] = "before"
    projector_at: ClassVar[str | None] = None
    pooling_in: ClassVar[str | None] = "downsample_factor"
    grouped_by: ClassVar[Literal["opening", "closing"]] = "closing"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Aya Vision: 2 x 2 tokens a tile, of 4 x 4 patches."""
        torch.manual_seed(0)
        config = AyaVisionConfig(
            vision_config=example_siglip(), text_config=example_llm(), image_token_index=EXAMPLE_IMAGE
        )
        return with_sharp_attention(AyaVisionForConditionalGeneration(config))
