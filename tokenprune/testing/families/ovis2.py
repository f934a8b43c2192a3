"""Ovis2."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2ImageProcessor,
    Ovis2Processor,
    Ovis2VisionConfig,
    Qwen2Config,
)

from tokenprune.adapter import Adapter
from tokenprune.models.ovis2 import Ovis2Adapter
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    build_llama_config,
    build_tower_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.tiled import TiledExample
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

INDICATORS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]


@cache
def processor() -> Any:
    """Return the processor: images are cut into at most six tiles."""
    special = {f"mark_{number}": token for number, token in enumerate(INDICATORS)}
    tok = tokenizer(image_token="<IMG_ATOM>", text_image="<image>", **special)
    images = Ovis2ImageProcessor(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=6)
    return Ovis2Processor(images, tok, image_seq_length=4, chat_template=TEMPLATE)


class Ovis2Example(TiledExample):
    """The example of Ovis2: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = Ovis2Adapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Ovis2."""
        torch.manual_seed(0)
        config = Ovis2Config(
            vision_config=Ovis2VisionConfig(**build_tower_config(hidden_stride=2, vocab_size=64)),
            text_config=Qwen2Config(**{**build_llama_config().to_dict(), "model_type": "qwen2"}),
            image_token_id=EXAMPLE_IMAGE,
            visual_indicator_token_ids=[10, 11, 12, 13, 14],
            vocab_size=64,
            hidden_size=32,
            tie_word_embeddings=False,
        )
        return with_sharp_attention(Ovis2ForConditionalGeneration(config))

    def build_image_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the token ids of an image, with the indicator ids of its grid."""
        start, base, column, row, end = self.adapter.indicator_ids
        line = [*([*self.tile_ids, column] * grid[1])[:-1], row]
        return [start, *self.tile_ids, base, *((line * grid[0])[:-1] if grid != (1, 1) else ()), end]


FAMILIES = [
    Family(
        "ovis2",
        Ovis2Adapter,
        processor,
        tokens={"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": INDICATORS},
        skip={
            "chunked prefill": "the unmodified model loses the features of its visual indicator tokens between chunks"
        },
    )
]
