"""Qwen3-VL: as Qwen2-VL; features of earlier tower layers are added in the first layers of the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tokenprune.adapter import Encoding, FeatureInputs
from tokenprune.models._base.example import with_sharp_attention
from tokenprune.models._base.native_resolution import EXAMPLE_IDS, MergedPatchesAdapter, example_mrope_llm


class Qwen3VLAdapter(MergedPatchesAdapter):
    """`Qwen3VLForConditionalGeneration`; a token is kept or dropped in every level of features."""

    family: ClassVar[str] = "qwen3_vl"
    model_class: ClassVar[str] = "Qwen3VLForConditionalGeneration"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Qwen3-VL with features of two layers added in the LLM."""
        torch.manual_seed(0)
        vision = {"depth": 4, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
        config = Qwen3VLConfig(
            vision_config={
                **vision,
                "patch_size": 14,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 2],
            },
            text_config={**example_mrope_llm(), "head_dim": 8},
            **EXAMPLE_IDS,
        )
        return with_sharp_attention(Qwen3VLForConditionalGeneration(config), tower="visual")

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], places: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return `mm_encoder_outputs` with the kept features of every level."""
        features = super().features_to_inputs(encoding, packed, places)
        outputs = features.inputs.get("mm_encoder_outputs", {}).get("image")
        if outputs is not None:
            places = [torch.arange(len(tokens)) for tokens in packed] if places is None else places
            levels = [
                [
                    tokens[kept.to(tokens.device)]
                    for tokens, kept in zip(list(level) * encoding.repeats, places, strict=True)
                    if len(kept)
                ]
                for level in outputs.deepstack_features
            ]
            outputs["deepstack_features"] = outputs.deepstack_features = levels
        return features
