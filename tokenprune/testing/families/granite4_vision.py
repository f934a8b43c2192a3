"""Granite 4 Vision."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionProcessor,
    LlavaNextImageProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.granite4_vision import Granite4VisionAdapter
from tokenprune.testing.examples.configs import (
    EXAMPLE_GRIDS,
    EXAMPLE_IMAGE,
    EXAMPLE_PAD,
    build_siglip_config,
    with_sharp_attention,
)
from tokenprune.testing.families.base import PATCH, TILE, Family
from tokenprune.testing.families.llava import LlavaNextExample
from tokenprune.testing.tiny_models import PINPOINTS, TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are cut into at most four tiles of 2 x 2 tokens."""
    square = {"height": TILE, "width": TILE}
    images = LlavaNextImageProcessor(size=square, crop_size=square, image_grid_pinpoints=PINPOINTS)
    return Granite4VisionProcessor(
        images,
        tokenizer(image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        downsample_rate="1/2",
    )


class Granite4VisionExample(LlavaNextExample):
    """The example of Granite 4 Vision: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = Granite4VisionAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny model: levels from two layers of the tower, and from four corners of one layer."""
        torch.manual_seed(0)
        vision = build_siglip_config()
        vision.hidden_size = 64  # the projector has one head per 64 channels
        text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        config = Granite4VisionConfig(
            vision_config=vision,
            text_config={**text, "num_hidden_layers": 6, "pad_token_id": EXAMPLE_PAD},
            image_token_index=EXAMPLE_IMAGE,
            image_grid_pinpoints=EXAMPLE_GRIDS,
            vision_feature_select_strategy="full",
            downsample_rate="1/2",
            deepstack_layer_map=[(-1, 0), (2, 1)],
            spatial_target_layers=[2, 3, 4, 5],
            qformer_config={"num_hidden_layers": 1, "intermediate_size": 64, "cross_attention_frequency": 1},
        )
        return with_sharp_attention(Granite4VisionForConditionalGeneration(config))


FAMILIES = [
    Family(
        "granite4_vision",
        Granite4VisionAdapter,
        processor,
        skip={
            "chunked prefill": "the unmodified model fails: transformers slices pooler_output, which its output lacks"
        },
    )
]
