"""Images of selections. Everything returns an image or a figure; nothing is shown, no global style is touched."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from tokenprune.selection import Selection

KEPT, GRANTED = "#D55E00", "#B4C7D9"
"""Vermilion for what is kept (told apart from blue-grey by every kind of color vision) and blue-grey for grants."""
INK, PADDING = "#222222", "#8A8A8A"
TILE_SIDE, GAP, LABEL = 240, 10, 24
"""Least side of a drawn tile, space between tiles, height of a label; in pixels."""


def overlay(selection: Selection, image: Image.Image | None = None) -> Image.Image:
    """Draw the kept tokens of every tile: the base tile at the left, the sub-images in their grid.

    Kept tokens are clear and outlined, dropped ones faded, and padding that the model removes itself is hatched.

    Args:
        selection: the selection, with pixels.
        image: the original image, to be drawn at the very left.

    Raises:
        ValueError: if the selection carries no pixels.
    """
    if selection.pixels is None:
        raise ValueError(
            "this selection carries no pixels (a run keeps those of its first images only); "
            "attach the reducer anew for the image that you want to see"
        )
    rows, cols = selection.geometry.tile_grid
    tiles = [_tile(selection, number) for number in range(selection.geometry.tiles)]
    width, height = tiles[0].size
    granted, kept = selection.granted_per_tile, selection.kept_per_tile
    left, scaled, caption = 0, None, ""
    if image is not None:
        caption = f"image {image.width} x {image.height}"
        share = min(2 * width / image.width, 2 * height / image.height)
        scaled = image.convert("RGB").resize(
            (max(1, round(image.width * share)), max(1, round(image.height * share))), Image.Resampling.LANCZOS
        )
        left = scaled.width + 3 * GAP
    across = left + width + (3 * GAP + cols * (width + GAP) - GAP if rows else 0)
    down = max(max(rows, 1) * (height + LABEL + GAP) - GAP, 0 if scaled is None else scaled.height + LABEL)
    sheet = Image.new("RGB", (across + 2 * GAP, down + 2 * GAP), "white")
    pen = ImageDraw.Draw(sheet)
    if scaled is not None:
        pen.text((GAP, GAP), caption, INK, _font())
        sheet.paste(scaled, (GAP, GAP + LABEL))
    for number, tile in enumerate(tiles):
        if number == 0:
            name, x, y = "base tile", GAP + left, GAP
        else:
            row, col = divmod(number - 1, cols)
            name, x = f"row {row + 1}, col {col + 1}", GAP + left + width + 3 * GAP + col * (width + GAP)
            y = GAP + row * (height + LABEL + GAP)
        short = "" if kept[number] == granted[number] else f" of {granted[number]} granted"
        pen.text((x, y), f"{name}: {kept[number]} kept{short}", INK, _font())
        sheet.paste(tile, (x, y + LABEL))
    return sheet


def budget_bars(selection: Selection) -> Figure:
    """Draw the tokens that each tile was granted and kept, aligned with its valid tokens.

    Args:
        selection: the selection.
    """
    granted, kept = selection.granted_per_tile, selection.kept_per_tile
    cols = selection.geometry.tile_grid[1]
    names = ["base"] + [f"{1 + n // cols},{1 + n % cols}" for n in range(selection.geometry.sub_images)]
    figure = Figure(figsize=(max(4.0, 1.4 + 0.7 * len(names)), 2.6), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(names))
    axes.bar(place, granted, width=0.8, color=GRANTED, label="granted")
    bars = axes.bar(place, kept, width=0.5, color=KEPT, label="kept")
    axes.bar_label(bars, fontsize=8, padding=2)
    axes.set_xticks(place, names, fontsize=8)
    axes.set_xlabel("tile (row, col)" if cols else "tile", fontsize=9)
    axes.set_ylabel("tokens", fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.25 * max(1, *granted, *kept))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    return figure


def report(selection: Selection, image: Image.Image | None = None) -> Image.Image:
    """Draw the overlay with the budget bars under it.

    Args:
        selection: the selection, with pixels.
        image: the original image, to be drawn at the very left.
    """
    top, figure = overlay(selection, image), budget_bars(selection)
    figure.set_dpi(100)
    bars = figure_image(figure)
    sheet = Image.new("RGB", (max(top.width, bars.width), top.height + bars.height), "white")
    sheet.paste(top, (0, 0))
    sheet.paste(bars, (0, top.height))
    return sheet


def figure_image(figure: Figure) -> Image.Image:
    """Return a matplotlib figure as a Pillow image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(14)


def _tile(selection: Selection, number: int) -> Image.Image:
    """Draw one tile: dropped tokens faded, kept ones outlined, padding hatched."""
    assert selection.pixels is not None
    pixels: NDArray[np.uint8] = selection.pixels[number].numpy()
    rows, cols = selection.geometry.token_grid
    zoom = max(1, math.ceil(TILE_SIDE / min(pixels.shape[:2])))
    pixels = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    height, width = pixels.shape[:2]
    row_of, col_of = np.arange(height) * rows // height, np.arange(width) * cols // width
    kept = selection.kept[number].cpu().numpy().reshape(rows, cols)
    valid = selection.geometry.valid[number].cpu().numpy().reshape(rows, cols)
    grey = pixels.mean(axis=2, keepdims=True)
    faded = 0.25 * grey + 0.75 * 235
    drawn = np.where(kept[row_of][:, col_of, None], pixels, faded)
    stripe = ((np.arange(height)[:, None] + np.arange(width)[None, :]) // 4 % 2)[..., None] * 40 + 150
    drawn = np.where(valid[row_of][:, col_of, None], drawn, stripe)
    tile = Image.fromarray(drawn.round().astype(np.uint8))
    pen = ImageDraw.Draw(tile)
    for row, col in np.argwhere(kept):
        top, bottom = -(-row * height // rows), -(-(row + 1) * height // rows) - 1
        left, right = -(-col * width // cols), -(-(col + 1) * width // cols) - 1
        pen.rectangle((left, top, right, bottom), outline=KEPT)
    pen.rectangle((0, 0, width - 1, height - 1), outline=PADDING)
    return tile
