"""LLaVA-1.5, LLaVA-NeXT, and LLaVA-NeXT as Granite Vision 3 uses it: a SigLIP tower and features of several layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from tokenprune.models._base.example import example_parts, example_siglip, with_sharp_attention
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import EXAMPLE_GRIDS, LlavaNextAdapter
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import tiny_processor


def granite_vision() -> Any:
    """Return a tiny LLaVA-NeXT with the architecture of Granite Vision 3: a SigLIP tower and several feature layers."""
    torch.manual_seed(0)
    config = LlavaNextConfig(
        **{**example_parts(), "vision_config": example_siglip()},
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
