"""Ovis2: the base tile first, then the sub-images in row-major order with text between them; pooled patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2VisionConfig, Qwen2Config

from tokenprune.models._base.example import EXAMPLE_IMAGE, example_llm, example_tower, with_sharp_attention
from tokenprune.models._base.tiled import TiledAdapter


class Ovis2Adapter(TiledAdapter):
    """`Ovis2ForConditionalGeneration`; a token is a mixture of words of a visual vocabulary."""

    family: ClassVar[str] = "ovis2"
    model_class: ClassVar[str] = "Ovis2ForConditionalGeneration"
    layers_path: ClassVar[str] = "transformer.encoder.layers"
    attention_name: ClassVar[str] = "attention"
    projector_path: ClassVar[str | None] = None
    base_first: ClassVar[bool] = True

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return int(self.tower.config.hidden_stride)

    @property
    def indicator_ids(self) -> Sequence[int]:
        """Token ids of the text around tiles: start, after the base tile, between columns, between rows, end."""
        ids: Sequence[int] = self.model.config.visual_indicator_token_ids
        return ids

    def grids(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return rows x cols of the sub-images, from the indicator ids after them."""
        rows = [1 + after.count(self.indicator_ids[3]) for after in self.ids_after(inputs, parts)]
        return [(r, (len(tiles) - 1) // r) if len(tiles) > 1 else (0, 0) for r, tiles in zip(rows, parts, strict=True)]

    def example_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the token ids of an image, with the indicator ids of its grid."""
        start, base, column, row, end = self.indicator_ids
        line = [*([*self.example_tile, column] * grid[1])[:-1], row]
        return [start, *self.example_tile, base, *((line * grid[0])[:-1] if grid != (1, 1) else ()), end]

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Ovis2: 2 x 2 tokens a tile, of 4 x 4 patches."""
        torch.manual_seed(0)
        config = Ovis2Config(
            vision_config=Ovis2VisionConfig(**example_tower(hidden_stride=2, vocab_size=64)),
            text_config=Qwen2Config(**{**example_llm().to_dict(), "model_type": "qwen2"}),
            image_token_id=EXAMPLE_IMAGE,
            visual_indicator_token_ids=[10, 11, 12, 13, 14],
            vocab_size=64,
            hidden_size=32,
            tie_word_embeddings=False,
        )
        return with_sharp_attention(Ovis2ForConditionalGeneration(config))
