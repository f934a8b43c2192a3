"""Mistral Small 3.1: native resolution, 2 x 2 patches become one token, a text separator ends each row of an image."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from tokenprune.models._base.example import EXAMPLE_IMAGE, example_llm, with_sharp_attention
from tokenprune.models._base.native_resolution import PixtralTowerAdapter, example_pixtral


class Mistral3Adapter(PixtralTowerAdapter):
    """`Mistral3ForConditionalGeneration`; a patch merger in the projector joins the patches of a token."""

    family: ClassVar[str] = "mistral3"
    model_class: ClassVar[str] = "Mistral3ForConditionalGeneration"
    projector_path: ClassVar[str | None] = None

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return int(self.model.config.spatial_merge_size)

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Mistral 3."""
        torch.manual_seed(0)
        config = Mistral3Config(
            vision_config=example_pixtral(patch_size=14), text_config=example_llm(), image_token_index=EXAMPLE_IMAGE
        )
        return with_sharp_attention(Mistral3ForConditionalGeneration(config))
