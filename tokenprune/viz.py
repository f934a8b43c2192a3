"""Draws selections. Functions return images or figures; they open no window and change no global style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from tokenprune.selection import Selection

KEPT, GRANTED = "#D55E00", "#B4C7D9"
"""Vermilion for kept tokens and blue-gray for granted tokens, distinguishable with every kind of color vision."""
DROPPED = ("#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2")
"""Tints of the tokens dropped at each cut inside the LLM, distinguishable with every kind of color vision."""
INK, PADDING = "#222222", "#8A8A8A"
FADED = "#EBEBEB"
"""Color of the tokens dropped before the LLM in the legend."""
TOWER = "#8C564B"
"""Tint of the tokens whose patches were dropped or merged inside the vision tower."""
TILE_SIDE, GAP, LABEL = 240, 10, 24
"""Smallest side of a drawn tile, space between tiles, and height of a label, in pixels."""


def overlay(
    selection: Selection,
    image: Image.Image | None = None,
    cuts: Mapping[int, Selection] = MappingProxyType({}),
    tower_mask: Tensor | None = None,
) -> Image.Image:
    """Draw the kept tokens of every tile: the base tile at the left, the sub-images in their grid.

    Kept tokens are clear and outlined, dropped tokens are faded, and padding that the model removes is hatched. Tokens
    dropped inside the vision tower or the LLM are tinted with the color of their stage, which a legend names.

    Args:
        selection: the selection of the tokens that enter the LLM, with pixels.
        image: the original image, drawn to the left of the tiles.
        cuts: the selections at the cuts inside the LLM, by the first layer without dropped tokens, ascending.
        tower_mask: the tokens whose patches remained in the vision tower, bool `[tiles, tokens]`; None means all.

    Raises:
        ValueError: if the selection has no pixels.
    """
    if selection.pixels is None:
        raise ValueError(
            "this selection has no pixels (a run keeps the pixels of its first images only); "
            "attach the reducer again for the image to draw"
        )
    rows, cols = selection.geometry.tile_grid
    stages = [selection, *cuts.values()]
    tiles = [_draw_tile(stages, number, tower_mask) for number in range(selection.geometry.tiles)]
    width, height = tiles[0].size
    granted, kept = selection.granted_per_tile, selection.kept_per_tile
    counts = list(zip(*(stage.kept_per_tile for stage in stages), strict=True))
    legend = _list_legend(selection, cuts, tower_mask) if cuts or tower_mask is not None else []
    left, scaled, caption = 0, None, ""
    if image is not None:
        caption = f"image {image.width} x {image.height}"
        scale = min(2 * width / image.width, 2 * height / image.height)
        scaled = image.convert("RGB").resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
        )
        left = scaled.width + 3 * GAP
    sheet_width = left + width + (3 * GAP + cols * (width + GAP) - GAP if rows else 0)
    sheet_height = max(max(rows, 1) * (height + LABEL + GAP) - GAP, 0 if scaled is None else scaled.height + LABEL)
    legend_width = max((_load_font().getlength(text) for _, text in legend), default=0)
    sheet_width = max(sheet_width, math.ceil(legend_width) + LABEL)
    legend_top = sheet_height + 2 * GAP
    sheet = Image.new("RGB", (sheet_width + 2 * GAP, legend_top + LABEL * len(legend) + GAP * bool(legend)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (color, text) in enumerate(legend):
        y = legend_top + LABEL * line
        pen.rectangle((GAP, y + 2, GAP + 14, y + 16), fill=color, outline=KEPT if line == 0 else PADDING)
        pen.text((GAP + LABEL, y), text, INK, _load_font())
    if scaled is not None:
        pen.text((GAP, GAP), caption, INK, _load_font())
        sheet.paste(scaled, (GAP, GAP + LABEL))
    for number, tile in enumerate(tiles):
        if number == 0:
            name, x, y = "base tile", GAP + left, GAP
        else:
            row, col = divmod(number - 1, cols)
            name, x = f"row {row + 1}, col {col + 1}", GAP + left + width + 3 * GAP + col * (width + GAP)
            y = GAP + row * (height + LABEL + GAP)
        suffix = "" if kept[number] == granted[number] else f" of {granted[number]} granted"
        text = f"{name}: {' > '.join(map(str, counts[number]))} kept{suffix}"
        pen.text((x, y), text, INK, _load_font())
        sheet.paste(tile, (x, y + LABEL))
    return sheet


def _list_legend(
    selection: Selection, cuts: Mapping[int, Selection], tower_mask: Tensor | None
) -> list[tuple[str, str]]:
    """Return color and text of each group of tokens: those that remain, and those dropped at each stage."""
    numbers = [selection.geometry.valid_tokens, selection.kept_tokens, *(cut.kept_tokens for cut in cuts.values())]
    lines = [("white", f"{numbers[-1]} of {numbers[0]} tokens remain to the last layer")]
    entering = numbers[0]
    if tower_mask is not None:
        entering = int((tower_mask & selection.geometry.valid).sum())
        lines.append((TOWER, f"{numbers[0] - entering} dropped or merged inside the vision tower"))
    if entering > numbers[1]:
        lines.append((FADED, f"{entering - numbers[1]} dropped before the LLM"))
    for layer, color, (before, after) in zip(cuts, cycle(DROPPED), pairwise(numbers[1:]), strict=False):
        lines.append((color, f"{before - after} dropped before layer {layer}"))
    return lines


def draw_budget_bars(selection: Selection) -> Figure:
    """Draw one bar per tile with the numbers of granted and kept tokens.

    Args:
        selection: the selection.
    """
    granted, kept = selection.granted_per_tile, selection.kept_per_tile
    cols = selection.geometry.tile_grid[1]
    names = ["base"] + [f"{1 + n // cols},{1 + n % cols}" for n in range(selection.geometry.sub_images)]
    figure = Figure(figsize=(max(4.0, 1.4 + 0.7 * len(names)), 2.6), layout="constrained")
    axes = figure.subplots()
    xs = np.arange(len(names))
    axes.bar(xs, granted, width=0.8, color=GRANTED, label="granted")
    bars = axes.bar(xs, kept, width=0.5, color=KEPT, label="kept")
    axes.bar_label(bars, fontsize=8, padding=2)
    axes.set_xticks(xs, names, fontsize=8)
    axes.set_xlabel("tile (row, col)" if cols else "tile", fontsize=9)
    axes.set_ylabel("tokens", fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.25 * max(1, *granted, *kept))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    return figure


def draw_report(
    selection: Selection, image: Image.Image | None = None, cuts: Mapping[int, Selection] = MappingProxyType({})
) -> Image.Image:
    """Draw the overlay with the budget bars of the tokens that enter the LLM below it.

    Args:
        selection: the selection, with pixels.
        image: the original image, drawn to the left of the tiles.
        cuts: the selections at the cuts inside the LLM, as in `overlay`.
    """
    top, figure = overlay(selection, image, cuts), draw_budget_bars(selection)
    figure.set_dpi(100)
    bars = render_figure(figure)
    sheet = Image.new("RGB", (max(top.width, bars.width), top.height + bars.height), "white")
    sheet.paste(top, (0, 0))
    sheet.paste(bars, (0, top.height))
    return sheet


def render_figure(figure: Figure) -> Image.Image:
    """Return a matplotlib figure as a Pillow image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _load_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(14)


def _draw_tile(stages: Sequence[Selection], number: int, tower_mask: Tensor | None = None) -> Image.Image:
    """Draw one tile: remaining tokens outlined, dropped tokens faded or tinted, padding hatched.

    Args:
        stages: the selection of the tokens that enter the LLM, with pixels, and the selections at the cuts.
        number: number of the tile.
        tower_mask: the tokens whose patches remained in the vision tower, bool `[tiles, tokens]`; None means all.
    """
    entered = stages[0]
    assert entered.pixels is not None
    pixels: NDArray[np.uint8] = entered.pixels[number].numpy()
    rows, cols = entered.geometry.token_grid
    zoom = max(1, math.ceil(TILE_SIDE / min(pixels.shape[:2])))
    pixels = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    height, width = pixels.shape[:2]
    row_of, col_of = np.arange(height) * rows // height, np.arange(width) * cols // width

    def enlarge(mask: Tensor) -> NDArray[np.bool_]:
        grid: NDArray[np.bool_] = mask.cpu().numpy().reshape(rows, cols)
        return grid[row_of][:, col_of, None]

    gray = pixels.mean(axis=2, keepdims=True)
    drawn = 0.25 * gray + 0.75 * 235
    if tower_mask is not None:
        tint = 0.4 * gray + 0.6 * np.array(ImageColor.getrgb(TOWER))
        drawn = np.where(enlarge(tower_mask[number]), drawn, tint)
    for stage, color in zip(stages[1:], cycle(DROPPED), strict=False):
        tint = 0.4 * gray + 0.6 * np.array(ImageColor.getrgb(color))
        drawn = np.where(enlarge(stage.geometry.valid[number]), tint, drawn)
    kept = stages[-1].kept[number]
    drawn = np.where(enlarge(kept), pixels, drawn)
    stripe = ((np.arange(height)[:, None] + np.arange(width)[None, :]) // 4 % 2)[..., None] * 40 + 150
    drawn = np.where(enlarge(entered.geometry.valid[number]), drawn, stripe)
    tile = Image.fromarray(drawn.round().astype(np.uint8))
    pen = ImageDraw.Draw(tile)
    for row, col in np.argwhere(kept.cpu().numpy().reshape(rows, cols)):
        top, bottom = -(-row * height // rows), -(-(row + 1) * height // rows) - 1
        left, right = -(-col * width // cols), -(-(col + 1) * width // cols) - 1
        pen.rectangle((left, top, right, bottom), outline=KEPT)
    pen.rectangle((0, 0, width - 1, height - 1), outline=PADDING)
    return tile
