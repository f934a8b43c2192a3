"""GLM-4.1V."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.glm4v import Glm4vAdapter
from tokenprune.testing.examples.configs import EXAMPLE_IMAGE, build_mrope_config, with_sharp_attention
from tokenprune.testing.examples.native_resolution import MergedPatchesExample
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer

TOKENS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}


@cache
def processor() -> Any:
    """Return the processor: image sizes are rounded to whole tokens of 28 pixels."""
    special = {name.removesuffix("_id"): token for name, token in TOKENS.items()}
    images = Glm4vImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 128})
    return Glm4vProcessor(images, tokenizer(**special), Glm4vVideoProcessor(), chat_template=TEMPLATE)


class Glm4vExample(MergedPatchesExample):
    """The example of GLM-4.1V."""

    adapter_class: ClassVar[type[Adapter]] = Glm4vAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny GLM-4.1V."""
        torch.manual_seed(0)
        config = Glm4vConfig(
            vision_config={
                "depth": 4,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "image_size": 56,
                "patch_size": 14,
            },
            text_config=build_mrope_config(),
            image_token_id=EXAMPLE_IMAGE,
            video_token_id=4,
            image_start_token_id=10,
            image_end_token_id=11,
            video_start_token_id=12,
            video_end_token_id=13,
        )
        return with_sharp_attention(Glm4vForConditionalGeneration(config), tower="visual")


FAMILIES = [
    Family(
        "glm4v",
        Glm4vAdapter,
        processor,
        tokens=TOKENS,
        image="<|begin_of_image|><|image|><|end_of_image|>",
        spots=((112, 112), (56, 140), (140, 56)),
    )
]
