"""LFM2-VL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from einops import rearrange
from transformers import (
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    Siglip2VisionConfig,
)

from tokenprune.adapter import Adapter
from tokenprune.models.lfm2_vl import Lfm2VlAdapter
from tokenprune.testing.examples.base import Size
from tokenprune.testing.examples.configs import EXAMPLE_IMAGE, EXAMPLE_TILE, build_decoder_config, with_sharp_attention
from tokenprune.testing.examples.tiled import TiledExample
from tokenprune.testing.families.base import PATCH, TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

SPECIAL = {f"tile_{row}_{col}": f"<|img_row_{row}_col_{col}|>" for row in range(1, 5) for col in range(1, 5)}


@cache
def processor() -> Any:
    """Return the processor.

    Large images are cut into at most four tiles. Small images and the base tile keep their aspect ratio.
    """
    images = Lfm2VlImageProcessor(
        encoder_patch_size=PATCH,
        tile_size=TILE,
        max_tiles=4,
        min_image_tokens=6,
        max_image_tokens=8,
        max_pixels_tolerance=1.0,
    )
    tok = tokenizer(
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
        **SPECIAL,
    )
    return Lfm2VlProcessor(images, tok, chat_template=TEMPLATE)


class Lfm2VlExample(TiledExample):
    """The example of LFM2-VL: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = Lfm2VlAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny LFM2-VL with a convolution and an attention layer."""
        torch.manual_seed(0)
        vision = Siglip2VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_patches=16,
            patch_size=14,
            vision_use_head=False,
        )
        text = Lfm2Config(
            **build_decoder_config(num_key_value_heads=2, tie_word_embeddings=False),
            layer_types=["conv", "full_attention"],
        )
        config = Lfm2VlConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=EXAMPLE_IMAGE,
            projector_hidden_size=64,
            tie_word_embeddings=False,
        )
        return with_sharp_attention(Lfm2VlForConditionalGeneration(config))

    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the patches of each tile, and their number."""
        tiles = torch.cat([self.build_tiles(size) for size in sizes])
        patch = self.adapter.tower.config.patch_size
        patches = rearrange(tiles, "n c (h y) (w x) -> n (h w) (y x c)", y=patch, x=patch)
        shapes = torch.tensor([[EXAMPLE_TILE // patch] * 2] * len(tiles))
        mask = torch.ones(patches.shape[:2], dtype=torch.int32)
        return {self.adapter.pixels: patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def without_convolutions() -> Any:
    """Return a model with attention in every layer of its LLM, so that dropping a token equals masking it."""
    config = Lfm2VlExample.build_model().config
    config.text_config.layer_types = ["full_attention", "full_attention"]
    torch.manual_seed(0)
    return with_sharp_attention(Lfm2VlForConditionalGeneration(config))


FAMILIES = [
    Family(
        "lfm2_vl",
        Lfm2VlAdapter,
        processor,
        nested=True,
        oracle=None,
        why="convolutions in the language model read adjacent tokens, and a masked token remains adjacent",
        spots=((168, 168),),
    ),
    Family(
        "lfm2_vl_attention",
        Lfm2VlAdapter,
        processor,
        example=without_convolutions,
        nested=True,
        spots=((168, 168),),
    ),
]
