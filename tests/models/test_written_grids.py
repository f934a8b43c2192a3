"""The grids that adapters read from prompts and pixels are those that the real processors made."""

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


@pytest.mark.parametrize("family", NAMES)
def test_grids_are_those_of_the_processor(family: str) -> None:
    one = FAMILIES[family]
    layouts: Any = find_adapter(one.model()).layouts(one.batch(SIZES[:3], [], SIZES[3:]))  # type: ignore[attr-defined]
    images = [random_image(*size) for size in SIZES]
    made = [tuple(map(int, grid)) for grid in one.processor().image_processor(images)[NAMES[family]]]
    assert [layout.tile_grid for layout in layouts] == [grid if grid != (1, 1) else (0, 0) for grid in made]


def test_crops_go_to_their_image() -> None:
    """Two images without crops stand behind one with crops: the ids between all of them are the same."""
    one = FAMILIES["gemma3"]
    processor = one.processor()
    layouts: Any = find_adapter(one.model()).layouts(one.batch(SIZES[:3], [], SIZES[3:]))  # type: ignore[attr-defined]
    images = [[random_image(*size) for size in SIZES]]
    crops = processor.image_processor(images, **processor.images_kwargs)["num_crops"]
    assert [layout.sub_images for layout in layouts] == crops
    assert [layout.tile_grid for layout in layouts][:4] == [(1, 3), (0, 0), (0, 0), (3, 1)]


def test_padding_belongs_to_no_region() -> None:
    """60 x 160 pixels stand at the top left of a canvas of 2 x 3 tiles of 56 pixels."""
    one = FAMILIES["llama4"]
    layout: Any = find_adapter(one.model()).layouts(one.batch([SIZES[0]]))[0]  # type: ignore[attr-defined]
    assert layout.tile_grid == (2, 3)
    torch.testing.assert_close(layout.regions[1], torch.tensor([0.0, 56 / 160, 56 / 60, 112 / 160]), atol=0.03, rtol=0)
    torch.testing.assert_close(layout.regions[5], torch.tensor([56 / 60, 112 / 160, 1.0, 1.0]), atol=0.03, rtol=0)
