"""Idefics: tile grids that are read from the prompt, and the attention of a resampler to its latents."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Idefics3ImageProcessor, Idefics3Processor

from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.image import Signal
from tokenprune.models.idefics2 import Idefics2Adapter
from tokenprune.models.idefics3 import tile_grids
from tokenprune.testing.families.base import TILE
from tokenprune.testing.tiny_models import TEMPLATE, random_image, tokenizer


@cache
def build_processor_without_tile_tokens() -> Any:
    """Return a processor whose tokenizer has no tokens for tile positions and splits them into several tokens."""
    sizes = {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}}
    special = {"image_token": "<image>", "fake": "<fake_token_around_image>", "end": "<end_of_utterance>"}
    return Idefics3Processor(
        Idefics3ImageProcessor(**sizes), tokenizer(**special), image_seq_len=4, chat_template=TEMPLATE
    )


def read_grids(processor: Any, rows: list[list[Image.Image]]) -> list[tuple[int, int]]:
    texts = ["<image>" * len(row) + "what is in the image?" for row in rows]
    inputs = processor(images=rows, text=texts, return_tensors="pt", padding=True)
    return tile_grids(inputs["input_ids"], processor.image_token_id)


@pytest.mark.parametrize("has_tile_tokens", [True, False])
def test_grids_are_read_from_the_prompt(has_tile_tokens: bool) -> None:
    """Adjacent images without text between them; a tokenizer with and without tokens for tile positions."""
    processor = FAMILIES["idefics3"].processor() if has_tile_tokens else build_processor_without_tile_tokens()
    sizes = [[(112, 112), (50, 168)], [], [(168, 50), (160, 90), (90, 160)]]
    rows = [[random_image(*size) for size in row] for row in sizes]
    assert read_grids(processor, rows) == [(3, 3), (1, 3), (3, 1), (3, 2), (2, 3)]


def test_images_of_one_color_have_their_grid() -> None:
    rows = [[Image.new("RGB", (168, 100), "red"), Image.new("RGB", (100, 168), "red")]]
    assert read_grids(FAMILIES["idefics3"].processor(), rows) == [(2, 3), (3, 2)]


def test_images_that_are_not_split_have_no_grid() -> None:
    ids = torch.tensor([[1, 8, 9, 3, 3, 8, 8, 9, 3, 3, 8, 5], [0] * 12, [0, 0, 0, 0, 0, 1, 8, 9, 3, 3, 8, 5]])
    assert tile_grids(ids, 3) == [(0, 0)] * 3


def test_rows_of_tiles_of_different_lengths_raise() -> None:
    tile = [8, 9, 3]
    ids = torch.tensor([[1, *tile, *tile, 10, *tile, 10, *tile, 8, 5]])
    with pytest.raises(ValueError, match="3 tiles of an image are not a grid"):
        tile_grids(ids, 3)


def test_a_wrong_number_of_tiles_raises() -> None:
    family = FAMILIES["idefics3"]
    inputs = dict(family.batch([(112, 112)]))
    inputs["pixel_values"] = inputs["pixel_values"][:, :-1]
    with pytest.raises(ValueError, match="placeholders for 10 tiles, but there are 9"):
        find_adapter(family.model()).layouts(inputs)


@torch.no_grad()
def test_attention_to_latents_equals_the_full_map_of_the_resampler() -> None:
    """With images of two sizes, the padding of the smaller image is not part of the context."""
    family = FAMILIES["idefics2"]
    model = family.model()
    model.set_attn_implementation("eager")
    adapter = Idefics2Adapter(model)
    inputs = family.batch([(56, 56), (28, 50)])
    maps: list[torch.Tensor] = []
    layers = adapter.tower_layers
    hook = layers[1].self_attn.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    needs = [Signal("received_attention", 1), Signal("keys", 1), Signal("vision_features", 1)]
    images = adapter.encode(inputs, needs).images
    hook.remove()
    tokens = adapter.token_grid[1]
    assert len(images) == 2
    assert maps[0].shape[-1] > tokens
    expected = maps[0][..., -tokens:].mean(dim=2)
    for image, row in zip(images, expected, strict=True):
        assert float(row.std()) > 1e-3
        torch.testing.assert_close(image.received_attention(1)[0], row)
        assert image.keys(1).shape[2] == tokens
        assert image.vision_features(1).shape[1] == tokens
