"""Llama 4."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4ImageProcessor,
    Llama4Processor,
    Llama4TextConfig,
    Llama4VisionConfig,
)

from tokenprune.adapter import Adapter
from tokenprune.models.llama4 import Llama4Adapter
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    build_decoder_config,
    build_tower_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.tiled import TiledExample
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

SPECIAL = {
    "image_token": "<|image|>",
    "patch_token": "<|patch|>",
    "boi_token": "<|image_start|>",
    "eoi_token": "<|image_end|>",
    "column_token": "<|tile_x_separator|>",
    "row_token": "<|tile_y_separator|>",
}


@cache
def processor() -> Any:
    """Return the processor: images are put on a canvas of at most six tiles."""
    images = Llama4ImageProcessor(size={"height": TILE, "width": TILE}, max_patches=6)
    template = TEMPLATE.replace("<image>", "<|image|>")
    return Llama4Processor(images, tokenizer(**SPECIAL), patch_size=14, chat_template=template)


class Llama4Example(TiledExample):
    """The example of Llama 4: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = Llama4Adapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Llama 4 with two experts in each second layer."""
        torch.manual_seed(0)
        vision = Llama4VisionConfig(
            **build_tower_config(intermediate_size=128),
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
        )
        text = Llama4TextConfig(
            **build_decoder_config(num_hidden_layers=4, num_key_value_heads=2, head_dim=8),
            intermediate_size_mlp=64,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=2,
        )
        config = Llama4Config(
            vision_config=vision,
            text_config=text,
            image_token_index=EXAMPLE_IMAGE,
            boi_token_index=8,
            eoi_token_index=9,
        )
        model = Llama4ForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "experts" in name and parameter.dim() == 3:
                    parameter.normal_(std=0.02)
        return with_sharp_attention(model, tower="vision_model")

    def build_image_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the token ids of an image: 11 separates columns, 12 ends a row, 13 opens the base tile."""
        line = [*([*self.tile_ids, 11] * grid[1])[:-1], 12]
        return [8, *(line * grid[0] if grid != (1, 1) else ()), 13, *self.tile_ids, 9]


FAMILIES = [
    Family(
        "llama4",
        Llama4Adapter,
        processor,
        tokens={
            "image_token_index": "<|patch|>",
            "boi_token_index": "<|image_start|>",
            "eoi_token_index": "<|image_end|>",
        },
        image="<|image|>",
        beams=False,
        why="the unmodified model cannot repeat its images for beams",
        skip={"chunked prefill": "the unmodified model cannot cut its images for chunks"},
    )
]
