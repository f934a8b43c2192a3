"""Idefics3 and SmolVLM: sub-images in row-major order, each after text that names its place, the whole picture last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tokenprune.models.placeholder import EXAMPLE_IMAGE, EXAMPLE_TILE, example_llm, with_sharp_attention
from tokenprune.models.tiles import TiledAdapter
from tokenprune.rewrite import TextSeparatorSide


class Idefics3Adapter(TiledAdapter):
    """`Idefics3ForConditionalGeneration`; the tiles of a sample stand together, and all-zero ones are padding."""

    family: ClassVar[str] = "idefics3"
    model_class: ClassVar[str] = "Idefics3ForConditionalGeneration"
    text_separator_side: ClassVar[TextSeparatorSide] = "before"
    tower_at: ClassVar[str] = "vision_model"
    projector_at: ClassVar[str | None] = "connector.modality_projection"
    language_model_at: ClassVar[str] = "text_model"
    grouped_by: ClassVar[Literal["opening", "closing"]] = "closing"
    features_by_tile: ClassVar[bool] = False

    @cached_property
    def pooling(self) -> int:
        """Patches along a side that become one visual token."""
        return int(self.model.config.scale_factor)

    def all_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tiles that the tower sees, `[tiles, 3, height, width]`; the model skips all-zero ones."""
        tiles: Tensor = inputs[self.pixels].flatten(0, 1)
        return tiles[(tiles != 0).flatten(1).any(dim=1)]

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the tiles of all pictures as one sample."""
        return {self.pixels: super().example_pixels(sizes)[self.pixels][None]}

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Idefics3: 2 x 2 tokens a tile, of 4 x 4 patches."""
        torch.manual_seed(0)
        config = Idefics3Config(vision_config=dict(EXAMPLE_TOWER), **example_rest())
        return with_sharp_attention(Idefics3ForConditionalGeneration(config), tower="vision_model")


class SmolVLMAdapter(Idefics3Adapter):
    """`SmolVLMForConditionalGeneration`."""

    family: ClassVar[str] = "smolvlm"
    model_class: ClassVar[str] = "SmolVLMForConditionalGeneration"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny SmolVLM: 2 x 2 tokens a tile, of 4 x 4 patches."""
        torch.manual_seed(0)
        config = SmolVLMConfig(vision_config=dict(EXAMPLE_TOWER), **example_rest())
        return with_sharp_attention(SmolVLMForConditionalGeneration(config), tower="vision_model")


EXAMPLE_TOWER: Mapping[str, int] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": EXAMPLE_TILE,
    "patch_size": 14,
}
"""The vision configuration of a tiny model."""


def example_rest() -> dict[str, Any]:
    """Return the rest of the configuration of a tiny model."""
    return {"text_config": example_llm(), "image_token_id": EXAMPLE_IMAGE, "scale_factor": 2, "pad_token_id": 0}
