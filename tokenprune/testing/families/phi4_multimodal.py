"""Phi-4-multimodal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
)

from tokenprune.adapter import Adapter
from tokenprune.models.phi4_multimodal import Phi4MultimodalAdapter
from tokenprune.testing.examples.base import PlaceholderExample, Size, seed_pixels
from tokenprune.testing.examples.configs import EXAMPLE_IMAGE, EXAMPLE_PAD, EXAMPLE_TILE
from tokenprune.testing.examples.tiled import fit_grid
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


class Phi4MultimodalExample(PlaceholderExample):
    """The example of Phi-4-multimodal: 2 x 2 tokens a tile, of 4 x 4 patches."""

    adapter_class: ClassVar[type[Adapter]] = Phi4MultimodalAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Phi-4-multimodal."""
        small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        config = Phi4MultimodalConfig(
            **small,
            num_hidden_layers=2,
            num_key_value_heads=2,
            vocab_size=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=EXAMPLE_PAD,
            vision_config={
                **small,
                "num_hidden_layers": 4,
                "image_size": EXAMPLE_TILE,
                "crop_size": EXAMPLE_TILE,
                "patch_size": 14,
                "image_token_id": EXAMPLE_IMAGE,
            },
            audio_config={**small, "num_blocks": 1, "audio_token_id": 4, "nemo_conv_channels": 16},
        )
        return build_from_config(config)

    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the tiles of each image on a canvas of at most two tiles a side, without padding."""
        grids = [fit_grid(size) for size in sizes]
        max_tiles = 1 + max(rows * cols for rows, cols in grids)
        pixels = torch.zeros(len(sizes), max_tiles, 3, EXAMPLE_TILE, EXAMPLE_TILE)
        for image, size, (rows, cols) in zip(pixels, sizes, grids, strict=True):
            tiles = 1 + rows * cols
            image[:tiles] = torch.randn(tiles, *image.shape[1:], generator=seed_pixels(size))
        patches = EXAMPLE_TILE // self.adapter.tower.config.patch_size
        return {
            self.adapter.pixels: pixels,
            "image_sizes": torch.tensor(grids) * EXAMPLE_TILE,
            "image_attention_mask": torch.ones(len(sizes), max_tiles, patches, patches),
        }


def build_from_config(config: Phi4MultimodalConfig) -> Any:
    """Return a model with random weights for a configuration."""
    torch.manual_seed(0)
    return Phi4MultimodalForCausalLM(config).eval()  # attention is far from uniform at initialization


def with_processor_tokens() -> Any:
    """Return a tiny model with the special tokens of the processor."""
    config = Phi4MultimodalExample.build_model().config
    config.vision_config.image_token_id = processor().tokenizer.convert_tokens_to_ids("<image>")
    config.audio_config.audio_token_id = processor().tokenizer.convert_tokens_to_ids("<audio>")
    return build_from_config(config)


FAMILIES = [
    Family(
        "phi4_multimodal",
        Phi4MultimodalAdapter,
        processor,
        tokens={},
        example=with_processor_tokens,
        beams=False,
        attn="eager",
        scale=1.0,
        why="In the unmodified model, beams mix up the images of a prompt with two images. Under sdpa, its vision "
        "tower is causal unless an image of the batch has padding, so that the encoding of an image depends on the "
        "other images.",
        skip={"chunked prefill": "the unmodified model encodes images in every chunk of a prompt, and fails"},
    )
]
