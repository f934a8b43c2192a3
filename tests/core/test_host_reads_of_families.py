"""Operators, reads and copies of reduced calls of several families on an emulated accelerator."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from itertools import count
from typing import Any

import pytest
import torch

from tests.helpers.emulated_device import DEVICE, EmulatedDevice, move_model, to_cpu, to_device
from tests.helpers.families import FAMILIES
from tokenprune.geometry import TileGeometry
from tokenprune.models._base.vision_inputs import compute_once
from tokenprune.models.llava_onevision import canvas_tokens, shrink_layout, shrink_signal
from tokenprune.models.qwen2_5_vl import window_order
from tokenprune.reducer import TokenReducer
from tokenprune.run import DRAWABLE
from tokenprune.saliency import _axis_shares
from tokenprune.strategies import HiRED

READS = {"llava": 1, "llava_next": -1, "llava_onevision": 3, "internvl": 3, "qwen2_5_vl": -7}
"""Reads beyond the plain model: of the prompts, the sizes or ids of the images, and the grids of tiles.

The numbers are negative for models that read more themselves to pack images or to compute positions.
"""
OPERATORS = {
    "llava": {1: 65, 8: 85},
    "llava_next": {1: 90, 8: 0},
    "llava_onevision": {1: 210, 8: 240},
    "internvl": {1: 230, 8: 275},
    "qwen2_5_vl": {1: 85, 8: 0},
}
"""Operators beyond the plain model, for one image and for eight images of one layout."""


@cache
def load_model(family: str) -> Any:
    return move_model(FAMILIES[family].model())


def count_call(family: str, images: int, reducer: TokenReducer | None = None) -> EmulatedDevice:
    """Return the counts of a call after the first ones, which copy tables and keep pixels for drawing."""
    model, inputs = load_model(family), dict(FAMILIES[family].batch(*[[(112, 112)]] * images))
    with torch.no_grad(), EmulatedDevice(), nullcontext() if reducer is None else reducer(model):
        for _ in range(1 if reducer is None else 1 + DRAWABLE // images):
            model(**to_device(inputs))
        with EmulatedDevice() as device:
            model(**to_device(inputs))
    return device


@pytest.mark.parametrize("family", READS)
def test_operators_and_reads_beyond_the_plain_model(family: str) -> None:
    reads = []
    for images in (1, 8):
        plain, reduced = count_call(family, images), count_call(family, images, HiRED(0.2, newlines="drop"))
        assert sum(reduced.operators.values()) - sum(plain.operators.values()) <= OPERATORS[family][images]
        assert sum(reduced.copies.values()) <= sum(plain.copies.values())
        reads.append(sum(reduced.reads.values()) - sum(plain.reads.values()))
    assert reads[1] <= reads[0] <= READS[family]


@pytest.mark.parametrize("family", ["llava_onevision", "internvl", "qwen2_5_vl"])
def test_a_budget_in_tokens_adds_no_reads(family: str) -> None:
    """The layouts of such a call are computed twice."""
    counts = [count_call(family, 2, HiRED(budget, newlines="drop")) for budget in (0.2, 9)]
    assert counts[0].reads == counts[1].reads


def test_scalars_in_a_list_are_read() -> None:
    values = to_device(torch.tensor([1.0, 2.0]))
    with EmulatedDevice() as device:
        joined = torch.tensor([values[0], values[1], 3.0], device=DEVICE)
    assert to_cpu(joined).tolist() == [1.0, 2.0, 3.0]
    assert device.reads == {"_local_scalar_dense": 2}


def test_tables_are_copied_to_the_device_once() -> None:
    layout, grids = TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56), (1, 8, 8)
    tables = []
    for function in (canvas_tokens, window_order, _axis_shares):
        function.cache_clear()
    with EmulatedDevice() as counts:
        for device in (torch.device("cpu"), torch.device(DEVICE), torch.device(DEVICE)):
            canvas, windows = canvas_tokens(layout, device), window_order(grids, 2, 56, 14, device)
            tables.append((canvas, windows, _axis_shares(4, 3, device, torch.float32)))
    assert (counts.copies, counts.reads) == ({"_to_copy": 3}, {})
    for expected, table in zip(*tables[:2], strict=True):
        assert torch.equal(to_cpu(table), expected)
    tokens = (tables[0][1][::4] / 4).tolist()  # two windows of 2 x 2 tokens in each row
    assert tokens == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize(
    ("kind", "shape"), [("received_attention", (3, 16)), ("vision_features", (16, 8)), ("keys", (2, 16, 4))]
)
def test_images_shrunk_together_have_the_signals_of_each_image(kind: str, shape: tuple[int, ...]) -> None:
    full = TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56)
    layout = shrink_layout(full, 2)
    value = torch.randn(3 * full.tiles, *shape, generator=torch.Generator().manual_seed(0))
    together = shrink_signal(kind, value, full, layout)
    alone = [shrink_signal(kind, part, full, layout) for part in value.split(full.tiles)]
    assert torch.equal(together, torch.cat(alone))


def test_a_result_is_computed_once_until_the_input_is_modified() -> None:
    pixels, on_cpu, compute = to_device(torch.zeros(2)), torch.zeros(2), partial(next, count())
    with EmulatedDevice():
        assert [compute_once(pixels, key, compute) for key in ("a", "a", "b", "a")] == [0, 0, 1, 0]
        pixels[0] = 1
        assert [compute_once(pixels, "a", compute) for _ in range(2)] == [2, 2]
    # An array with the same memory can change values on the CPU.
    assert [compute_once(on_cpu, "a", compute) for _ in range(2)] == [3, 4]
