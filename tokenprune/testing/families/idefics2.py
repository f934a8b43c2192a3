"""Idefics2, with and without splitting images into four parts."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, ClassVar

import torch
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2ImageProcessor, Idefics2Processor

from tokenprune.adapter import Adapter
from tokenprune.models.idefics2 import Idefics2Adapter
from tokenprune.testing.examples.base import Size
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    build_llama_config,
    build_tower_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.tiled import NestedTilesExample
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

NO_POSITIONS = "a latent of the resampler has no position in the image"
PARTS = "each part of a split image counts as an image"


@cache
def processor(split: bool) -> Any:
    """Return a processor that scales image sides to 28 to 56 pixels and pads the images.

    Args:
        split: whether images are split into four parts.
    """
    special = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}
    images = Idefics2ImageProcessor(do_image_splitting=split, size={"shortest_edge": 28, "longest_edge": 56})
    tok = tokenizer(**special, end_of_utterance="<end_of_utterance>")
    return Idefics2Processor(images, tok, image_seq_len=8, chat_template=TEMPLATE)


class Idefics2Example(NestedTilesExample):
    """The example of Idefics2: eight latents an image, which is not split."""

    adapter_class: ClassVar[type[Adapter]] = Idefics2Adapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Idefics2 with four resampler layers, because some methods read four layers."""
        torch.manual_seed(0)
        heads = {"resampler_depth": 4, "resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2}
        llm = build_llama_config()
        llm.hidden_size = 16  # also the width of the resampler
        config = Idefics2Config(
            vision_config=build_tower_config(),
            perceiver_config={"hidden_size": 16, "resampler_n_latents": 8, **heads},
            text_config=llm,
            image_token_id=EXAMPLE_IMAGE,
        )
        model = Idefics2ForConditionalGeneration(config)
        with torch.no_grad():
            model.model.connector.perceiver_resampler.latents.normal_()  # all latents are equal before training
        return with_sharp_attention(model, tower="perceiver_resampler")

    def choose_grid(self, size: Size) -> tuple[int, int]:
        """Return the grid of one tile."""
        return 1, 1


FAMILIES = [
    Family(
        name,
        Idefics2Adapter,
        partial(processor, split),
        nested=True,
        skip={
            "test_kept_tokens_show_the_bright_spot": NO_POSITIONS,
            "test_an_exchanged_token_grid_is_noticed": NO_POSITIONS,
            "test_a_saliency_model_sees_the_bright_spot": NO_POSITIONS,
            **({"test_each_row_equals_itself_alone": PARTS, "test_pipeline": PARTS} if split else {}),
        },
    )
    for name, split in (("idefics2", False), ("idefics2, split", True))
]
