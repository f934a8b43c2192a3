"""Tile layouts equal the packing of the real model, the token counts of the processor, and painted pixels."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tokenprune.geometry import NEWLINE, TileGeometry, anyres_regions, region_coverage
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.strategies.components.allocation import base_tile_coverage
from tokenprune.testing import tiny_models as tiny

SIZES = [
    *((56, 56), (112, 112), (56, 112), (112, 56), (168, 56), (56, 168), (200, 300), (300, 200), (97, 103), (400, 1000)),
    *((1000, 400), (336, 672), (600, 600), (13, 500), (500, 13), (3, 999), (999, 3), (40, 100), (100, 41), (57, 112)),
    *((127, 255), (61, 59), (30, 30), (1, 1), (2, 500)),
]


@cache
def adapter() -> LlavaNextAdapter:
    return LlavaNextAdapter(tiny.tiny_model("llava_next"))


def anyres_grid(size: tuple[int, int]) -> tuple[int, int]:
    return tuple(get_anyres_image_grid_shape(size, tiny.PINPOINTS, tiny.TILE))  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(size=st.one_of(st.sampled_from(SIZES), st.tuples(st.integers(1, 1200), st.integers(1, 1200))))
def test_anyres_packs_like_the_real_model(size: tuple[int, int]) -> None:
    """`anyres` computes the token order that `LlavaNextModel.pack_image_features` gives."""
    expected = adapter().layout(size)
    layout = TileGeometry.anyres(size, anyres_grid(size), (4, 4), tiny.TILE)
    assert torch.equal(layout.packed, expected.packed)
    assert torch.equal(layout.regions, expected.regions)
    assert layout.tile_grid == tuple(expected.tile_grid)
    assert torch.equal(layout.valid, expected.valid)


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 2 and max(size) / min(size) < 100])
def test_layout_has_one_entry_for_each_placeholder_of_the_real_processor(size: tuple[int, int]) -> None:
    inputs = tiny.batch("llava_next", [size])
    layout = adapter().layouts(inputs)[0]
    image_token = adapter().image_token_id
    assert len(layout.packed) == int((inputs["input_ids"] == image_token).sum())
    assert inputs["pixel_values"].shape[1] == layout.tiles


def test_layouts_of_a_batch_are_ordered_and_cached_by_size() -> None:
    inputs = tiny.batch("llava_next", [(200, 300), (100, 41)], [(200, 300)])
    first, second, third = adapter().layouts(inputs)
    assert [tuple(layout.tile_grid) for layout in (first, second, third)] == [(2, 2), (2, 1), (2, 2)]
    assert first is third
    assert len(second.packed) == len(adapter().layout((100, 41)).packed)


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    tokens=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_every_token_is_packed_at_most_once(size, grid, tokens) -> None:
    layout = TileGeometry.anyres(size, grid, tokens, 24)
    positions = layout.packed[layout.packed != NEWLINE]
    assert len(set(positions.tolist())) == len(positions) == int(layout.valid.sum())
    assert positions.numel() == 0 or (int(positions.min()) >= 0 and int(positions.max()) < layout.tiles * layout.tokens)
    assert bool(layout.valid[0].all())
    assert layout.tiles == 1 + grid[0] * grid[1]


def paint_image(size: tuple[int, int], grid: tuple[int, int], tile: int) -> tuple[np.ndarray, int, int]:
    """Return the sub-image index of every image pixel, int `[height, width]`, and the height and width.

    As in the processor, the image is scaled to fit the canvas (rounded up to a pixel) and centered (offset rounded
    down).
    """
    canvas = np.kron(np.arange(grid[0] * grid[1]).reshape(grid), np.ones((tile, tile), dtype=int))
    scale_w, scale_h = canvas.shape[1] / size[1], canvas.shape[0] / size[0]
    if scale_w < scale_h:
        width, height = canvas.shape[1], min(math.ceil(size[0] * scale_w), canvas.shape[0])
    else:
        height, width = canvas.shape[0], min(math.ceil(size[1] * scale_h), canvas.shape[1])
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    return canvas[top : top + height, left : left + width], height, width


@example(size=(237, 237), grid=(2, 1), tokens=(3, 1))  # 237 * (30 / 237) is a little more than 30: one more pixel
@settings(max_examples=40, deadline=None)
@given(
    size=st.one_of(st.sampled_from(SIZES), st.tuples(st.integers(20, 500), st.integers(20, 500))),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tokens=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_coverage_equals_a_count_of_painted_pixels(size, grid, tokens) -> None:
    tile = 30
    image, height, width = paint_image(size, grid, tile)
    # the base tile rescales the image: sample it densely, with the nearest image pixel for each sample
    samples = 60
    rows = (np.arange(tokens[0] * samples) + 0.5) / (tokens[0] * samples) * height
    cols = (np.arange(tokens[1] * samples) + 0.5) / (tokens[1] * samples) * width
    sub_image = image[rows.astype(int)][:, cols.astype(int)].reshape(tokens[0], samples, tokens[1], samples)
    expected = np.stack([(sub_image == index).mean(axis=(1, 3)).ravel() for index in range(grid[0] * grid[1])])
    coverage = region_coverage(anyres_regions(size, grid, tile), tokens).numpy()
    np.testing.assert_allclose(coverage, expected, atol=2.5 / samples)


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    tokens=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_regions_partition_the_base_tile(size, grid, tokens) -> None:
    """The canvas contains the full image, so the sub-images together cover every base token exactly once."""
    coverage = region_coverage(anyres_regions(size, grid, 56), tokens)
    assert coverage.shape == (grid[0] * grid[1], tokens[0] * tokens[1])
    assert float(coverage.min()) >= 0.0
    torch.testing.assert_close(coverage.sum(0), torch.ones(tokens[0] * tokens[1]), rtol=0, atol=1e-5)


@settings(deadline=None)
@given(grid=st.tuples(st.integers(1, 6), st.integers(1, 6)), tokens=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_without_padding_exact_regions_are_the_quadrants(grid, tokens) -> None:
    size = (grid[0] * 100, grid[1] * 100)
    layout = TileGeometry.anyres(size, grid, tokens, 56)
    exact, quadrant = base_tile_coverage(layout, "exact"), base_tile_coverage(layout, "quadrant")
    torch.testing.assert_close(exact, quadrant, rtol=0, atol=1e-5)
    torch.testing.assert_close(exact.sum(1), torch.full((len(exact),), math.prod(tokens) / len(exact)))


def test_with_padding_exact_regions_differ_from_quadrants() -> None:
    """Padding is split evenly: two rows of tiles hold half of the image each, and of three only the middle row."""
    layout = TileGeometry.anyres((600, 900), (2, 2), (4, 4), 60)
    top, left, bottom, right = layout.regions[1].tolist()
    assert (top, left, bottom, right) == pytest.approx((0.0, 0.5, 0.5, 1.0))
    tall = TileGeometry.anyres((100, 300), (2, 1), (4, 4), 60)  # 20 of 120 rows: 10 in each sub-image
    torch.testing.assert_close(tall.regions, torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 1]]))
    three_rows = TileGeometry.anyres((100, 300), (3, 1), (4, 4), 60)  # the middle sub-image contains the image
    assert three_rows.regions.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [1, 0, 1, 1]]
    exact = base_tile_coverage(three_rows, "exact").sum(1)
    assert exact.tolist() == [0, 16, 0]
    assert base_tile_coverage(three_rows, "quadrant").sum(1).tolist() == pytest.approx([16 / 3] * 3)


def test_stripes_equal_a_reshape_of_the_flat_tokens() -> None:
    layout = TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56)
    stripe, quadrant = base_tile_coverage(layout, "stripe"), base_tile_coverage(layout, "quadrant")
    assert torch.equal(stripe.view(4, 4, 4)[1], torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert torch.equal(
        quadrant.view(4, 4, 4)[1], torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    )
    flat = torch.rand(16)
    torch.testing.assert_close(stripe @ flat, flat.reshape(2, 2, -1).sum(-1).flatten())
    column = TileGeometry.anyres((112, 56), (2, 1), (4, 4), 56)
    assert torch.equal(base_tile_coverage(column, "stripe"), base_tile_coverage(column, "quadrant"))


def test_unknown_region_is_refused() -> None:
    with pytest.raises(ValueError, match="region='row' is not known"):
        base_tile_coverage(TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56), "row")


def test_single_tile_layout() -> None:
    layout = TileGeometry.single((3, 5))
    assert (layout.tiles, layout.sub_images, layout.tokens, layout.newlines) == (1, 0, 15, 0)
    assert layout.packed.tolist() == list(range(15))
    assert bool(layout.valid.all())
    assert layout.regions.shape == (0, 4)


def test_packed_order_of_small_layouts() -> None:
    """1 x 2 tiles of 2 x 2 tokens, no padding: canvas rows span both tiles."""
    layout = TileGeometry.anyres((10, 20), (1, 2), (2, 2), 10)
    assert layout.packed.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]
    transposed = TileGeometry.anyres((20, 10), (2, 1), (2, 2), 10)
    assert transposed.packed.tolist() == [0, 1, 2, 3, 4, 5, -1, 6, 7, -1, 8, 9, -1, 10, 11, -1]
