"""Adapters read the same tile grids from prompts and pixels that the real processors use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.testing.families.base import Size
from tokenprune.testing.tiny_models import random_image

SIZES: list[Size] = [(60, 160), (56, 56), (56, 56), (150, 50), (112, 112), (100, 200), (168, 40)]
NAMES = {"ovis2": "grids", "llama4": "aspect_ratios"}


@pytest.mark.parametrize("name", NAMES)
def test_grids_equal_the_grids_of_the_processor(name: str) -> None:
    family = FAMILIES[name]
    layouts: Any = find_adapter(family.model()).layouts(family.batch(SIZES[:3], [], SIZES[3:]))  # type: ignore[attr-defined]
    images = [random_image(*size) for size in SIZES]
    grids = [tuple(map(int, grid)) for grid in family.processor().image_processor(images)[NAMES[name]]]
    assert [layout.tile_grid for layout in layouts] == [grid if grid != (1, 1) else (0, 0) for grid in grids]


def test_crops_belong_to_their_image() -> None:
    """Two images without crops follow an image with crops; the token ids between all of them are equal."""
    family = FAMILIES["gemma3"]
    processor = family.processor()
    layouts: Any = find_adapter(family.model()).layouts(family.batch(SIZES[:3], [], SIZES[3:]))  # type: ignore[attr-defined]
    images = [[random_image(*size) for size in SIZES]]
    crops = processor.image_processor(images, **processor.images_kwargs)["num_crops"]
    assert [layout.sub_images for layout in layouts] == crops
    assert [layout.tile_grid for layout in layouts][:4] == [(1, 3), (0, 0), (0, 0), (3, 1)]


def test_regions_do_not_include_padding() -> None:
    """An image of 60 x 160 pixels is at the top left of a canvas of 2 x 3 tiles of 56 pixels."""
    family = FAMILIES["llama4"]
    layout: Any = find_adapter(family.model()).layouts(family.batch([SIZES[0]]))[0]  # type: ignore[attr-defined]
    assert layout.tile_grid == (2, 3)
    torch.testing.assert_close(layout.regions[1], torch.tensor([0.0, 56 / 160, 56 / 60, 112 / 160]), atol=0.03, rtol=0)
    torch.testing.assert_close(layout.regions[5], torch.tensor([56 / 60, 112 / 160, 1.0, 1.0]), atol=0.03, rtol=0)
