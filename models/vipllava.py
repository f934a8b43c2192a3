"""ViP-LLaVA: one tile per image, no newline tokens; features of several layers side by side."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from tokenprune.models._base.example import example_parts, with_sharp_attention
from tokenprune.models._base.single_tile import SingleTileAdapter


class VipLlavaAdapter(SingleTileAdapter):
    """`VipLlavaForConditionalGeneration`."""

    family: ClassVar[str] = "vipllava"
    model_class: ClassVar[str] = "VipLlavaForConditionalGeneration"
    features_by_tile: ClassVar[bool] = True
    resizable: ClassVar[bool] = True
    projects_per_token: ClassVar[bool] = True

    @classmethod
    def example(cls) -> Any:
        """Return a tiny ViP-LLaVA that uses features of two layers."""
        torch.manual_seed(0)
        config = VipLlavaConfig(**example_parts(), vision_feature_layer=[-2, 1])
        return with_sharp_attention(VipLlavaForConditionalGeneration(config))
