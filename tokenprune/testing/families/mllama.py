"""The tiny Llama 3.2 Vision model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessorPil, MllamaProcessor

from tokenprune.adapter import Adapter
from tokenprune.models.mllama import MllamaAdapter
from tokenprune.testing.examples.base import PlaceholderExample, Size, pad_prompts, seed_pixels
from tokenprune.testing.examples.configs import (
    EXAMPLE_IMAGE,
    EXAMPLE_PAD,
    EXAMPLE_TEXT,
    EXAMPLE_TILE,
    with_sharp_attention,
)
from tokenprune.testing.examples.tiled import fit_grid
from tokenprune.testing.families.base import TILE, Family
from tokenprune.testing.tiny_models import TEMPLATE, tokenizer


@cache
def processor() -> Any:
    """Return the processor: images are put on a canvas of at most four tiles."""
    tok = tokenizer(image_token="<|image|>", python_token="<|python_tag|>")
    images = MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=4)
    return MllamaProcessor(images, tok, chat_template=TEMPLATE)


class MllamaExample(PlaceholderExample):
    """The example of Llama 3.2 Vision: 4 x 4 tokens a tile."""

    adapter_class: ClassVar[type[Adapter]] = MllamaAdapter

    @classmethod
    def build_model(cls) -> Any:
        """Return a tiny Llama 3.2 Vision with one layer of cross-attention."""
        torch.manual_seed(0)
        small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
        config = MllamaConfig(
            vision_config={
                **small,
                "num_hidden_layers": 4,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": EXAMPLE_TILE,
                "patch_size": 14,
                "intermediate_layers_indices": [1, 3],
                "vision_output_dim": 96,
            },
            text_config={
                **small,
                "vocab_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "cross_attention_layers": [1],
                "pad_token_id": EXAMPLE_PAD,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            image_token_index=EXAMPLE_IMAGE,
        )
        model = with_sharp_attention(MllamaForConditionalGeneration(config), tower="vision_model")
        with torch.no_grad():  # gates are initialized with zero, so images would not affect the output
            for name, parameter in model.named_parameters():
                if "gate" in name:
                    parameter.fill_(1.0)
        return model

    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the tiles of all images as one prompt row."""
        return self.build_pixel_rows([sizes])

    def build_pixel_rows(self, rows: Sequence[Sequence[Size]]) -> dict[str, Any]:
        """Return the tiles of all images, and the aspect ratios of their canvases.

        Args:
            rows: for each prompt, height x width of its images in pixels.
        """
        config = self.adapter.tower.config
        max_tiles, images = config.max_num_tiles, max(1, *map(len, rows))
        pixels = torch.zeros(len(rows), images, max_tiles, 3, EXAMPLE_TILE, EXAMPLE_TILE)
        ids, mask = torch.zeros(len(rows), images, dtype=torch.long), torch.zeros(len(rows), images, max_tiles).long()
        mask[..., 0] = 1
        for row, sizes in enumerate(rows):
            for number, size in enumerate(sizes):
                grid = fit_grid(size)
                tiles = grid[0] * grid[1]
                ids[row, number] = 1 + config.supported_aspect_ratios.index(list(grid))
                mask[row, number, :tiles] = 1
                shape = (tiles, 3, EXAMPLE_TILE, EXAMPLE_TILE)
                pixels[row, number, :tiles] = torch.randn(shape, generator=seed_pixels(size))
        return {self.adapter.pixels: pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}

    def build_inputs(self, rows: Sequence[Sequence[Size]]) -> dict[str, Any]:
        """Return inputs with random pixels; text attends to all images whose marks precede it."""
        text = pad_prompts([[1, *(token for _ in row for token in [EXAMPLE_IMAGE, *EXAMPLE_TEXT]), 6] for row in rows])
        ids, vision = text["input_ids"], self.build_pixel_rows(rows)
        attended = torch.zeros(*ids.shape, *vision["aspect_ratio_mask"].shape[1:])
        for row, position in (ids == EXAMPLE_IMAGE).nonzero().tolist():
            number = int((ids[row, :position] == EXAMPLE_IMAGE).sum())
            attended[row, position:, number] = vision["aspect_ratio_mask"][row, number].float()
        return {**text, "cross_attention_mask": attended.long(), **vision}


FAMILY = Family(
    "mllama", MllamaAdapter, processor, {"image_token_index": "<|image|>"}, image="<|image|>", nested=True, scale=1.5
)
FAMILIES = [FAMILY]
