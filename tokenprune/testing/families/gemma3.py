"""Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
)

from tokenprune.adapter import Adapter
from tokenprune.models.gemma3 import Gemma3Adapter
from tokenprune.testing.examples.base import Size
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    build_decoder_config,
    build_siglip_config,
    with_sharp_attention,
)
from tokenprune.testing.examples.tiled import TiledExample
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


class PanAndScan(Gemma3Processor):
    """The processor with pan and scan, which is off by default, for small images."""

    images_kwargs: ClassVar[dict[str, Any]] = {  # type: ignore[assignment, misc]
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 32,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }


@cache
def processor() -> Any:
    """Return the processor: images of an aspect ratio of 2 or more are cut into two to four crops."""
    images = Gemma3ImageProcessor(size={"height": TILE, "width": TILE})
    tok = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    return PanAndScan(images, tok, image_seq_length=16, chat_template=TEMPLATE.replace("<image>", "<start_of_image>"))


class Gemma3Example(TiledExample):
    """The example of Gemma 3: 4 x 4 tokens a tile, of 8 x 8 patches."""

    adapter_class: ClassVar[type[Adapter]] = Gemma3Adapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Gemma 3 with a full and a sliding layer."""
        torch.manual_seed(0)
        text = Gemma3TextConfig(
            **build_decoder_config(
                num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=False
            ),
            layer_types=["sliding_attention", "full_attention"],
        )
        config = Gemma3Config(
            vision_config=build_siglip_config(patch_size=7),
            text_config=text,
            image_token_index=EXAMPLE_IMAGE,
            boi_token_index=8,
            eoi_token_index=9,
            mm_tokens_per_image=16,
            tie_word_embeddings=False,
        )
        model = Gemma3ForConditionalGeneration(config)
        with torch.no_grad():
            model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.02)
        return with_sharp_attention(model)

    def build_image_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the token ids of an image; 11 precedes the crops and 12 separates them."""
        tile, number = [8, *self.tile_ids, 9], max(grid)
        return [*tile, 11, *([*tile, 12] * number)[:-1]] if 1 in grid and number > 1 else tile

    def build_tiles(self, size: Size) -> Tensor:
        """Return the tiles of an image, `[tiles, 3, side, side]`; crops are one row or one column."""
        tiles = super().build_tiles(size)
        return tiles[:1] if len(tiles) > 3 else tiles

    def build_prompts(self, rows: Sequence[Sequence[Size]], images: Mapping[Size, Sequence[int]]) -> dict[str, Any]:
        """Return inputs with random pixels, and the type id of each token."""
        inputs = super().build_prompts(rows, images)
        return {**inputs, "token_type_ids": (inputs["input_ids"] == self.adapter.image_token_id).long()}


FAMILIES = [
    Family(
        "gemma3",
        Gemma3Adapter,
        processor,
        tokens={
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        image="<start_of_image>",
        nested=True,
        spots=((56, 56), (56, 112), (168, 56)),
        skip={
            "chunked prefill": "a chunk that ends inside an image changes its attention, also in the unmodified model"
        },
    )
]
