"""Reads from an emulated accelerator in reduced calls of the families: layouts and prompts are read at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.emulated_device import EmulatedDevice, move_model, to_device
from tokenprune.adapter import adapters
from tokenprune.models._base.tiled import find_grids, grid_difference, list_grids
from tokenprune.models._base.vision_inputs import read_once
from tokenprune.run import DRAWABLE
from tokenprune.strategies import FasterVLM
from tokenprune.testing.examples import build_example

READS = {
    "LlavaAdapter": 1,
    "LlavaOnevisionAdapter": 3,
    "InternVLAdapter": 3,
    "Idefics3Adapter": 2,
    "PixtralAdapter": 2,
    "MllamaAdapter": 5,
    "Phi4MultimodalAdapter": 5,
}
"""Reads beyond the plain model: of the layouts, the prompts and, after the tower, the kept newline tokens."""


@pytest.mark.parametrize("name", READS)
def test_reads_do_not_grow_with_the_images(name: str) -> None:
    example = build_example(adapters()[name])
    model = move_model(example.adapter.model)
    for images in (1, 4):
        inputs = example.build_inputs([[(112, 112)]] * images)

        def count_reads(inputs: Any = inputs) -> int:
            with EmulatedDevice() as device:
                model(**to_device(inputs))
            return sum(device.reads.values())

        with torch.no_grad(), EmulatedDevice():
            plain = count_reads()
            with FasterVLM(0.3)(model):
                for _ in range(1 + DRAWABLE // images):  # the first images keep pixels for drawing
                    reduced = count_reads()
        assert reduced - plain <= READS[name]


def test_a_tensor_is_read_once_until_it_is_modified() -> None:
    tensor = to_device(torch.tensor([[672, 336]]))
    with EmulatedDevice() as device:
        assert read_once(tensor).tolist() == read_once(tensor).tolist() == [[672, 336]]
        assert sum(device.reads.values()) == 1
        tensor[0, 0] = 56
        assert read_once(tensor).tolist() == [[56, 336]]


def test_grids_of_several_images_equal_the_grid_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    sub_images = [torch.rand(number, 3, 20, 20, generator=generator) for number in (6, 0, 4, 6, 1, 5, 4)]
    base_tiles = [torch.rand(3, 20, 20, generator=generator) for _ in sub_images]
    expected = []
    for tiles, base in zip(sub_images, base_tiles, strict=True):
        grids = list_grids(len(tiles))
        expected.append(min(grids, key=lambda grid: grid_difference(tiles, base, grid)) if len(grids) > 1 else grids[0])
    assert find_grids(sub_images, base_tiles) == expected
    assert find_grids([torch.ones(4, 3, 20, 20)], [torch.ones(3, 20, 20)]) == [(2, 2)]  # one color: most square
    assert (list_grids(0), list_grids(7)) == ([(0, 0)], [(1, 7), (7, 1)])
