"""PaliGemma: one tile per image, no newline tokens; images and question attend to each other; positions start at 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from tokenprune.models._base.example import EXAMPLE_IMAGE, EXAMPLE_PAD, example_siglip, with_sharp_attention
from tokenprune.models._base.single_tile import SingleTileAdapter


class PaliGemmaAdapter(SingleTileAdapter):
    """`PaliGemmaForConditionalGeneration`, versions 1 and 2: a SigLIP tower."""

    family: ClassVar[str] = "paligemma"
    model_class: ClassVar[str] = "PaliGemmaForConditionalGeneration"
    features_by_tile: ClassVar[bool] = True
    post_norm_path: ClassVar[str | None] = "post_layernorm"
    projects_per_token: ClassVar[bool] = True

    def forward_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the position ids that `forward` would compute. They start at 1; `generate` adds the 1 itself."""
        return super().forward_positions(inputs) + 1

    def counted_positions(self, mask: Tensor) -> Tensor:
        """Return position ids of the real positions, starting at 1."""
        return super().counted_positions(mask) + 1

    def example_prompts(
        self, rows: Sequence[Sequence[tuple[int, int]]], images: Mapping[tuple[int, int], Sequence[int]]
    ) -> dict[str, Any]:
        """Return inputs with random pixels; the complete prompt is prefix (token type 0)."""
        inputs = super().example_prompts(rows, images)
        return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}

    @classmethod
    def example(cls) -> Any:
        """Return a tiny PaliGemma."""
        torch.manual_seed(0)
        text = {"model_type": "gemma", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
        config = PaliGemmaConfig(
            vision_config=example_siglip(),
            text_config={**text, **layers, "pad_token_id": EXAMPLE_PAD},
            image_token_index=EXAMPLE_IMAGE,
            projection_dim=32,
            hidden_size=32,
        )
        return with_sharp_attention(PaliGemmaForConditionalGeneration(config))
