"""Idefics3 and SmolVLM."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.idefics3 import Idefics3Adapter, SmolVLMAdapter
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    build_llama_config,
    build_tower_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.tiled import NestedTilesExample
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

SPECIAL = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"row_{row}_col_{col}": f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)},
}
SIZES: dict[str, Any] = {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}}


@cache
def idefics3() -> Any:
    """Return the processor of Idefics3: images are scaled to a longer side of three tiles and cut into tiles."""
    images = Idefics3ImageProcessor(do_image_splitting=True, **SIZES)
    return Idefics3Processor(images, tokenizer(**SPECIAL), image_seq_len=4, chat_template=TEMPLATE)


@cache
def smolvlm() -> Any:
    """Return the processor of SmolVLM: images are cut as in Idefics3."""
    images = SmolVLMImageProcessor(do_image_splitting=True, **SIZES)
    video = SmolVLMVideoProcessor()
    return SmolVLMProcessor(images, tokenizer(**SPECIAL), video, image_seq_len=4, chat_template=TEMPLATE)


def build_config_entries() -> dict[str, Any]:
    """Return the configuration entries of a tiny model that do not concern the tower."""
    return {"text_config": build_llama_config(), "image_token_id": EXAMPLE_IMAGE, "scale_factor": 2, "pad_token_id": 0}


class Idefics3Example(NestedTilesExample):
    """The example of Idefics3: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = Idefics3Adapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Idefics3."""
        torch.manual_seed(0)
        config = Idefics3Config(vision_config=build_tower_config(), **build_config_entries())
        return with_sharp_attention(Idefics3ForConditionalGeneration(config), tower="vision_model")

    def build_image_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the token ids of an image; 8 encloses it, 9 names a tile, 10 is a line break."""
        (lines, cols), tile = grid, [8, 9, *self.tile_ids]
        return [*([*tile * cols, 10] * lines if lines * cols > 1 else []), *tile, 8]


class SmolVLMExample(Idefics3Example):
    """The example of SmolVLM: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = SmolVLMAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny SmolVLM."""
        torch.manual_seed(0)
        config = SmolVLMConfig(vision_config=build_tower_config(), **build_config_entries())
        return with_sharp_attention(SmolVLMForConditionalGeneration(config), tower="vision_model")


FAMILIES = [
    Family("idefics3", Idefics3Adapter, idefics3, nested=True, spots=((168, 168), (56, 168), (168, 112))),
    Family("smolvlm", SmolVLMAdapter, smolvlm, nested=True, spots=((168, 168), (56, 168), (168, 112))),
]
