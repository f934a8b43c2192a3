"""Test that figures show the selected tokens and the budgets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tokenprune import Selection, TileGeometry
from tokenprune.viz import (
    DROPPED,
    FADED,
    GAP,
    KEPT,
    LABEL,
    TILE_SIDE,
    draw_budget_bars,
    draw_mask,
    draw_report,
    format_caption,
    overlay,
    render_figure,
    save_figure,
)

KEPT_RGB = tuple(int(KEPT[k : k + 2], 16) for k in (1, 3, 5))


def make_selection(tile_grid: tuple[int, int], image_size: tuple[int, int] = (60, 60)) -> Selection:
    """Return a selection over blue tiles of 40 x 40 pixels and 4 x 4 tokens that keeps token (1, 1) of each tile."""
    if tile_grid == (0, 0):
        geometry = TileGeometry.single((4, 4))
    else:
        geometry = TileGeometry.anyres(image_size, tile_grid, (4, 4), 40)
    kept = torch.zeros(geometry.tiles, geometry.tokens, dtype=torch.bool)
    kept[:, 5] = True
    kept &= geometry.valid
    pixels = torch.tensor([10, 20, 250], dtype=torch.uint8).expand(geometry.tiles, 40, 40, 3)
    return Selection(geometry, kept, asked=int(kept.sum()), pixels=pixels)


def token_color(image: Image.Image, tile: tuple[int, int], row: int, col: int) -> tuple[int, ...]:
    """Return the color at the center of a token of the tile with the given top left corner."""
    size = TILE_SIDE // 4
    return image.getpixel((tile[0] + col * size + size // 2, tile[1] + row * size + size // 2))


def test_kept_tokens_are_clear_and_dropped_tokens_faded() -> None:
    image = overlay(make_selection((0, 0)))
    corner = (GAP, GAP + LABEL)
    for row in range(4):
        for col in range(4):
            color = token_color(image, corner, row, col)
            if (row, col) == (1, 1):
                assert color == (10, 20, 250)
            else:
                assert min(color) > 180
                assert len(set(color)) == 1
    size = TILE_SIDE // 4
    assert image.getpixel((corner[0] + size, corner[1] + size)) == KEPT_RGB


@pytest.mark.parametrize("grid", [(1, 2), (3, 1), (2, 2), (6, 6)])
def test_every_sub_image_is_drawn_at_its_position(grid: tuple[int, int]) -> None:
    selection = make_selection(grid, (grid[0] * 40, grid[1] * 40))
    kept = torch.zeros_like(selection.kept)
    for tile in range(selection.geometry.tiles):
        kept[tile, tile % 16] = True
    image = overlay(dataclasses.replace(selection, kept=kept))
    for tile in range(1, selection.geometry.tiles):
        row, col = divmod(tile - 1, grid[1])
        x = GAP + TILE_SIDE + 3 * GAP + col * (TILE_SIDE + GAP)
        y = GAP + LABEL + row * (TILE_SIDE + LABEL + GAP)
        assert token_color(image, (x, y), (tile % 16) // 4, tile % 4) == (10, 20, 250)
    assert image.width == GAP + TILE_SIDE + 3 * GAP + grid[1] * (TILE_SIDE + GAP)


def test_padding_is_hatched() -> None:
    selection = make_selection((1, 2), (20, 80))  # half as high as the canvas: rows of padding above and below
    assert not selection.geometry.valid.all()
    image = overlay(selection)
    x, y = GAP + TILE_SIDE + 3 * GAP, GAP + LABEL
    patch = np.asarray(image)[y + 4 : y + 40, x + 4 : x + 40]
    assert set(np.unique(patch)) == {150, 190}
    unpadded = overlay(make_selection((1, 2), (40, 80)))
    assert image.height == unpadded.height + LABEL + GAP  # the legend of the hatching
    swatch = np.asarray(image)[unpadded.height + 4 : unpadded.height + 12, GAP + 3 : GAP + 12]
    assert set(np.unique(swatch)) == {150, 190}


def test_the_image_is_drawn_next_to_the_tiles() -> None:
    selection, photo = make_selection((2, 2)), Image.new("RGB", (50, 100), (0, 200, 0))
    with_photo = overlay(selection, photo)
    assert with_photo.width > overlay(selection).width
    assert with_photo.getpixel((GAP + 20, GAP + LABEL + 100)) == (0, 200, 0)


def test_drawing_a_selection_without_pixels_raises() -> None:
    with pytest.raises(ValueError, match=r"has no pixels.*attach the reducer again"):
        overlay(dataclasses.replace(make_selection((2, 2)), pixels=None))


def test_bars_show_budgets_and_kept_tokens() -> None:
    selection = dataclasses.replace(make_selection((2, 2)), budgets=torch.tensor([3, 1, 4, 1, 5]))
    axes = draw_budget_bars(selection).axes[0]
    granted, kept = ([bar.get_height() for bar in group] for group in axes.containers[:2])
    assert granted == [3, 1, 4, 1, 5]
    assert kept == selection.kept_per_tile
    assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "1,1", "1,2", "2,1", "2,2"]


def test_the_report_contains_overlay_and_bars() -> None:
    selection = make_selection((1, 3))
    report, overlay_image = draw_report(selection), overlay(selection)
    assert report.crop((0, 0, *overlay_image.size)).tobytes() == overlay_image.tobytes()
    assert report.height == overlay_image.height + render_figure(draw_budget_bars(selection)).height


def test_a_caption_moves_the_tiles_down() -> None:
    selection = make_selection((0, 0))
    caption = format_caption("HiRED", "20%", selection, "What is " + "very " * 30 + "long?", "4")
    assert caption[0] == "HiRED, 20%: 1 of 16 visual tokens enter the LLM"
    image, plain = overlay(selection, caption=caption), overlay(selection)
    added = image.height - plain.height
    assert image.width == plain.width
    assert added > 4 * LABEL
    assert image.crop((0, added + GAP, *image.size)).tobytes() == plain.crop((0, GAP, *plain.size)).tobytes()


def test_headings_of_a_tall_image_do_not_collide() -> None:
    selection = make_selection((2, 1), (90, 20))
    image = overlay(selection, Image.new("RGB", (20, 200), (0, 200, 0)))
    heading = np.asarray(image)[GAP : GAP + LABEL, :, 0] < 128
    columns = np.flatnonzero(heading.any(axis=0))
    gaps = np.diff(columns)
    assert sum(gap >= 2 * GAP for gap in gaps) == 2  # three headings: image, base tile, row 1


@pytest.mark.parametrize("grid", [(2, 2), (0, 0)])
def test_the_mask_lies_over_the_original_image(grid: tuple[int, int], tmp_path: Path) -> None:
    selection, photo = make_selection(grid, (80, 80)), Image.new("RGB", (160, 160), (0, 200, 0))
    kept = torch.zeros_like(selection.kept)
    kept[-1, 5] = True  # the last sub-image, or the only tile
    figure = draw_mask(dataclasses.replace(selection, kept=kept), photo)
    assert [axes.get_title() for axes in figure.axes] == (
        ["sub-images: 1 token", "base tile: 0 tokens"] if grid[0] else ["1 token"]
    )
    picture, veil = (layer.get_array() for layer in figure.axes[0].images)
    assert np.array_equal(picture, np.asarray(photo))
    clear = np.argwhere(veil[..., 3] == 0).tolist()
    assert clear == [[4 + 1, 4 + 1] if grid[0] else [1, 1]]
    assert [layer.get_extent() for layer in figure.axes[0].images] == [[0, 160, 160, 0]] * 2
    save_figure(figure, tmp_path / "kept.PNG")
    with Image.open(tmp_path / "kept.PNG") as image:
        assert image.format == "PNG"
    with pytest.raises(ValueError, match=r"kept\.gif: a figure is written as \.png, \.pdf, \.svg"):
        save_figure(figure, tmp_path / "kept.gif")


def test_figures_do_not_change_matplotlib_state() -> None:
    import matplotlib as mpl
    from matplotlib import pyplot

    before, open_figures = dict(mpl.rcParams), pyplot.get_fignums()
    draw_report(make_selection((2, 2)))
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == open_figures


def test_tokens_dropped_inside_the_llm_have_the_color_of_their_cut() -> None:
    selection = make_selection((0, 0))
    kept = torch.zeros(1, 16, dtype=torch.bool)
    kept[0, :8] = True  # rows 2 and 3 are dropped before the LLM
    entered = dataclasses.replace(selection, kept=kept, asked=8)
    first, second = kept.clone(), kept.clone()
    first[0, 4:] = False  # row 1 is dropped at the first cut
    second[0, 1:] = False  # and the row 0 except one token at the second
    left = entered.geometry.restrict(entered.packed_mask())
    cuts = {2: Selection(left, first, 4), 5: Selection(left.restrict(first[0, :8]), second, 1)}
    image = overlay(entered, cuts=cuts)
    colors = [[token_color(image, (GAP, GAP + LABEL), row, col) for col in range(4)] for row in range(4)]
    assert colors[0][0] == (10, 20, 250)
    tints = [tuple(round(0.4 * 280 / 3 + 0.6 * part) for part in ImageColor.getrgb(color)) for color in DROPPED[:2]]
    assert colors[1] == [tints[0]] * 4
    assert colors[0][1:] == [tints[1]] * 3
    assert all(len(set(color)) == 1 for row in colors[2:] for color in row)
    plain = overlay(entered)
    assert (image.width >= plain.width, image.height) == (True, plain.height + 4 * LABEL + GAP)  # four groups of tokens
    swatches = [image.getpixel((GAP + 7, plain.height + LABEL * line + 8)) for line in range(4)]
    assert swatches == [ImageColor.getrgb(color) for color in ("white", FADED, *DROPPED[:2])]
    assert draw_report(entered, cuts=cuts).height > image.height
