"""Figures: what they show is what was selected."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tokenprune import Selection, TileGeometry
from tokenprune.viz import GAP, KEPT, LABEL, TILE_SIDE, draw_budget_bars, draw_report, overlay, render_figure

KEPT_RGB = tuple(int(KEPT[k : k + 2], 16) for k in (1, 3, 5))


def selection(tile_grid: tuple[int, int], image_size: tuple[int, int] = (60, 60)) -> Selection:
    """A selection over blue tiles of 40 x 40 pixels and 4 x 4 tokens that keeps the second token of each tile."""
    if tile_grid == (0, 0):
        geometry = TileGeometry.single((4, 4))
    else:
        geometry = TileGeometry.anyres(image_size, tile_grid, (4, 4), 40)
    kept = torch.zeros(geometry.tiles, geometry.tokens, dtype=torch.bool)
    kept[:, 5] = True
    kept &= geometry.valid
    pixels = torch.tensor([10, 20, 250], dtype=torch.uint8).expand(geometry.tiles, 40, 40, 3)
    return Selection(geometry, kept, asked=int(kept.sum()), pixels=pixels)


def token(image: Image.Image, tile: tuple[int, int], row: int, col: int) -> tuple[int, ...]:
    """The color in the middle of a token of the tile whose corner is given."""
    size = TILE_SIDE // 4
    return image.getpixel((tile[0] + col * size + size // 2, tile[1] + row * size + size // 2))


def test_kept_tokens_are_clear_and_dropped_ones_faded() -> None:
    image = overlay(selection((0, 0)))
    corner = (GAP, GAP + LABEL)
    for row in range(4):
        for col in range(4):
            color = token(image, corner, row, col)
            if (row, col) == (1, 1):
                assert color == (10, 20, 250)
            else:
                assert min(color) > 180
                assert len(set(color)) == 1
    size = TILE_SIDE // 4
    assert image.getpixel((corner[0] + size, corner[1] + size)) == KEPT_RGB


@pytest.mark.parametrize("grid", [(1, 2), (3, 1), (2, 2), (6, 6)])
def test_every_sub_image_stands_at_its_place(grid: tuple[int, int]) -> None:
    one = selection(grid, (grid[0] * 40, grid[1] * 40))
    kept = torch.zeros_like(one.kept)
    for tile in range(one.geometry.tiles):
        kept[tile, tile % 16] = True
    image = overlay(dataclasses.replace(one, kept=kept))
    for tile in range(1, one.geometry.tiles):
        row, col = divmod(tile - 1, grid[1])
        x = GAP + TILE_SIDE + 3 * GAP + col * (TILE_SIDE + GAP)
        y = GAP + LABEL + row * (TILE_SIDE + LABEL + GAP)
        assert token(image, (x, y), (tile % 16) // 4, tile % 4) == (10, 20, 250)
    assert image.width == GAP + TILE_SIDE + 3 * GAP + grid[1] * (TILE_SIDE + GAP)


def test_padding_is_hatched() -> None:
    one = selection((1, 2), (20, 80))  # half as high as the canvas: rows of padding above and below
    assert not one.geometry.valid.all()
    image = overlay(one)
    x, y = GAP + TILE_SIDE + 3 * GAP, GAP + LABEL
    patch = np.asarray(image)[y + 4 : y + 40, x + 4 : x + 40]
    assert set(np.unique(patch)) == {150, 190}


def test_the_image_stands_beside_the_tiles() -> None:
    one, photo = selection((2, 2)), Image.new("RGB", (50, 100), (0, 200, 0))
    with_photo = overlay(one, photo)
    assert with_photo.width > overlay(one).width
    assert with_photo.getpixel((GAP + 20, GAP + LABEL + 100)) == (0, 200, 0)


def test_without_pixels_there_is_an_answer() -> None:
    with pytest.raises(ValueError, match=r"has no pixels.*attach the reducer again"):
        overlay(dataclasses.replace(selection((2, 2)), pixels=None))


def test_bars_are_the_budgets() -> None:
    one = dataclasses.replace(selection((2, 2)), budgets=torch.tensor([3, 1, 4, 1, 5]))
    axes = draw_budget_bars(one).axes[0]
    granted, kept = ([bar.get_height() for bar in group] for group in axes.containers[:2])
    assert granted == [3, 1, 4, 1, 5]
    assert kept == one.kept_per_tile
    assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "1,1", "1,2", "2,1", "2,2"]


def test_report_holds_overlay_and_bars() -> None:
    one = selection((1, 3))
    whole, top = draw_report(one), overlay(one)
    assert whole.crop((0, 0, *top.size)).tobytes() == top.tobytes()
    assert whole.height == top.height + render_figure(draw_budget_bars(one)).height


def test_figures_leave_global_state_alone() -> None:
    import matplotlib as mpl
    from matplotlib import pyplot

    before, open_figures = dict(mpl.rcParams), pyplot.get_fignums()
    draw_report(selection((2, 2)))
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == open_figures
