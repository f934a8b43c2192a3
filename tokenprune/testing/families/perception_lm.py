"""PerceptionLM."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.perception_lm import PerceptionLMAdapter
from tokenprune.testing.examples.base import Size
from tokenprune.testing.examples.configs import EXAMPLE_IMAGE, EXAMPLE_TILE, build_llama_config, with_sharp_attention
from tokenprune.testing.examples.tiled import TiledExample
from tokenprune.testing.families.base import PATCH, TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are cut into at most four tiles, and the base tile is added."""
    return PerceptionLMProcessor(
        PerceptionLMVideoProcessor(),
        PerceptionLMImageProcessor(tile_size=TILE, max_num_tiles=4, vision_input_type="thumb+tile"),
        tokenizer(image_token="<image>", video_token="<video>"),
        patch_size=PATCH,
        pooling_ratio=2,
        chat_template=TEMPLATE,
    )


class PerceptionLMExample(TiledExample):
    """The example of PerceptionLM: 2 x 2 tokens a tile, of 4 x 4 patches; every image has four sub-images."""

    adapter_class: ClassVar[type[Adapter]] = PerceptionLMAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny PerceptionLM."""
        torch.manual_seed(0)
        shape = {"embed_dim": 32, "depth": 4, "num_heads": 4, "img_size": [EXAMPLE_TILE] * 2, "ref_feat_shape": [4, 4]}
        config = PerceptionLMConfig(
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_lang_large_patch14_448",
                "do_pooling": False,
                "model_args": {**shape, "global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1},
            },
            text_config=build_llama_config(),
            projector_pooling_ratio=2,
            image_token_id=EXAMPLE_IMAGE,
            video_token_id=4,
        )
        return with_sharp_attention(PerceptionLMForConditionalGeneration(config))

    def choose_grid(self, size: Size) -> tuple[int, int]:
        """Return the grid of four sub-images whose aspect ratio is nearest to the image."""
        return min([(2, 2), (1, 4), (4, 1)], key=lambda grid: abs(grid[0] / grid[1] - size[0] / size[1]))

    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the tiles of each image, in the model's order."""
        return {self.adapter.pixels: torch.stack([self.build_tiles(size) for size in sizes])}


FAMILIES = [
    Family(
        "perception_lm",
        PerceptionLMAdapter,
        processor,
        tokens={"image_token_id": "<image>", "video_token_id": "<video>"},
        sizes=((112, 112), (56, 224), (220, 50), (50, 200)),  # four tiles each: the pixels of a batch are one tensor
        spots=((112, 112), (56, 224), (224, 56)),
    )
]
