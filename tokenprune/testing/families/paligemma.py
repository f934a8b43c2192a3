"""PaliGemma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, SiglipImageProcessor

from tokenprune.adapter import Adapter
from tokenprune.models.paligemma import PaliGemmaAdapter
from tokenprune.testing.examples.base import Size
from tokenprune.testing.examples.configs import EXAMPLE_IMAGE, EXAMPLE_PAD, build_siglip_config, with_sharp_attention
from tokenprune.testing.examples.single_tile import SingleTileExample
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


class PaliGemmaFamily(Family):
    """The family of PaliGemma; its processor also returns labels, which are all -100."""

    def inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the processor's output for images and prompts without the labels."""
        batch = super().inputs(*args, **kwargs)
        batch.pop("labels")
        return batch


@cache
def processor() -> Any:
    """Return the processor: images are resized to a square."""
    images = SiglipImageProcessor(size={"height": TILE, "width": TILE}, image_seq_length=16)
    return PaliGemmaProcessor(images, tokenizer(image_token="<image>"), chat_template=TEMPLATE)


class PaliGemmaExample(SingleTileExample):
    """The example of PaliGemma."""

    adapter_class: ClassVar[type[Adapter]] = PaliGemmaAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny PaliGemma."""
        torch.manual_seed(0)
        text = {"model_type": "gemma", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
        config = PaliGemmaConfig(
            vision_config=build_siglip_config(),
            text_config={**text, **layers, "pad_token_id": EXAMPLE_PAD},
            image_token_index=EXAMPLE_IMAGE,
            projection_dim=32,
            hidden_size=32,
        )
        return with_sharp_attention(PaliGemmaForConditionalGeneration(config))

    def build_prompts(self, rows: Sequence[Sequence[Size]], images: Mapping[Size, Sequence[int]]) -> dict[str, Any]:
        """Return inputs with random pixels; the complete prompt is prefix (token type 0)."""
        inputs = super().build_prompts(rows, images)
        return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


FAMILIES = [
    PaliGemmaFamily("paligemma", PaliGemmaAdapter, processor, nested=True, spots=((56, 56), (56, 112)), scale=1.5)
]
