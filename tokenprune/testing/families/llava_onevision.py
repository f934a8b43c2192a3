"""LLaVA-OneVision."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.llava_onevision import LlavaOnevisionAdapter
from tokenprune.testing.examples.configs import (
    EXAMPLE_GRIDS,
    build_llava_config,
    build_siglip_config,
    with_sharp_attention,
)
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.families.llava import LlavaNextExample
from tokenprune.testing.tiny_models import PINPOINTS, TEMPLATE, tokenizer

TOKENS = {"image_token_id": "<image>", "video_token_id": "<video>"}


@cache
def processor() -> Any:
    """Return the processor.

    If a prompt row has one image, it is cut into at most four tiles. Several images of a row are not cut.
    """
    square = {"height": TILE, "width": TILE}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINPOINTS),
        tokenizer(image_token="<image>", video_token="<video>"),
        LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        vision_aspect_ratio="anyres_max_2",
    )


class LlavaOnevisionExample(LlavaNextExample):
    """The example of LLaVA-OneVision."""

    adapter_class: ClassVar[type[Adapter]] = LlavaOnevisionAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny LLaVA-OneVision that shrinks a canvas of four tiles to the tokens of two."""
        torch.manual_seed(0)
        parts = {**build_llava_config(), "vision_config": build_siglip_config()}
        config = LlavaOnevisionConfig(
            **parts, image_grid_pinpoints=EXAMPLE_GRIDS, vision_aspect_ratio="anyres_max_2", video_token_index=4
        )
        return with_sharp_attention(LlavaOnevisionForConditionalGeneration(config))


FAMILIES = [
    Family(
        "llava_onevision",
        LlavaOnevisionAdapter,
        processor,
        tokens=TOKENS,
        nested=True,
        # the model shrinks no canvas of these sizes; tests/models/test_onevision.py tests shrunk canvases
        spots=((56, 112), (112, 56)),
    )
]
