"""ViP-LLaVA."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from tokenprune.adapter import Adapter
from tokenprune.models.vipllava import VipLlavaAdapter
from tokenprune.testing.examples.configs import build_llava_config, with_sharp_attention
from tokenprune.testing.examples.single_tile import SingleTileExample
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import tiny_processor


class VipLlavaExample(SingleTileExample):
    """The example of ViP-LLaVA."""

    adapter_class: ClassVar[type[Adapter]] = VipLlavaAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny ViP-LLaVA that uses features of two layers."""
        torch.manual_seed(0)
        config = VipLlavaConfig(**build_llava_config(), vision_feature_layer=[-2, 1])
        return with_sharp_attention(VipLlavaForConditionalGeneration(config))


FAMILIES = [Family("vipllava", VipLlavaAdapter, partial(tiny_processor, "llava"), spots=((56, 56),))]
