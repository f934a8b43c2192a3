"""Phi-4-multimodal."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import Phi4MultimodalFeatureExtractor, Phi4MultimodalImageProcessor, Phi4MultimodalProcessor

from tokenprune.models.phi4_multimodal import Phi4MultimodalAdapter
from tokenprune.testing.families.base import PATCH, TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


class TinyImages(Phi4MultimodalImageProcessor):
    """The image processor for tiles of 2 x 2 tokens; the original counts 16 rows of 16 tokens for the base tile."""

    def _preprocess(self, images: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the processed images with the token counts of small tiles."""
        data = super()._preprocess(images, **kwargs)
        data["num_img_tokens"] = [number - (256 + 16) + (4 + 2) for number in data["num_img_tokens"]]
        return data


@cache
def processor() -> Any:
    """Return the processor; it cuts an image into as many tiles as its pixels fill."""
    tok = tokenizer(image_token="<image>", audio_token="<audio>")
    images = TinyImages(size={"height": TILE, "width": TILE}, patch_size=PATCH, dynamic_hd=6)
    return Phi4MultimodalProcessor(images, Phi4MultimodalFeatureExtractor(), tok, chat_template=TEMPLATE)


def example() -> Any:
    """Return a tiny model with the special tokens of the processor."""
    config = Phi4MultimodalAdapter.example().config
    config.vision_config.image_token_id = processor().tokenizer.convert_tokens_to_ids("<image>")
    config.audio_config.audio_token_id = processor().tokenizer.convert_tokens_to_ids("<audio>")
    return Phi4MultimodalAdapter.example_of(config)


FAMILIES = [
    Family(
        "phi4_multimodal",
        Phi4MultimodalAdapter,
        processor,
        tokens={},
        example=example,
        beams=False,
        attn="eager",
        scale=1.0,
        why="In the unmodified model, beams mix up the images of a prompt with two images. Under sdpa, its vision "
        "tower is causal unless an image of the batch has padding, so that the encoding of an image depends on the "
        "other images.",
        skip={"chunked prefill": "the unmodified model encodes images in every chunk of a prompt, and fails"},
    )
]
