"""Draws selections. Functions return images or figures; they open no window and change no global style."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from tokenprune.display import format_count
from tokenprune.image_files import write_file

if TYPE_CHECKING:
    from tokenprune.selection import Selection

KEPT, GRANTED = "#D55E00", "#B4C7D9"
"""Vermilion for kept tokens and blue-gray for granted tokens, distinguishable with every kind of color vision."""
DROPPED = ("#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2")
"""Tints of the tokens dropped at each cut inside the LLM, distinguishable with every kind of color vision."""
INK, PADDING = "#222222", "#8A8A8A"
FADED = "#EBEBEB"
"""Color of the tokens dropped before the LLM in the legend."""
HATCHED = "hatched"
"""Stands for the hatching of padding in the legend."""
BARS_HEIGHT = 2.0
"""Height of the budget bars in inches."""
VEIL = (0.12, 0.12, 0.16, 0.68)
"""Color and opacity of the dark veil over dropped tokens in `draw_mask`; visible on white and on colored images."""
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
TOWER = "#8C564B"
"""Tint of the tokens whose patches were dropped or merged inside the vision tower."""
TILE_SIDE, GAP, LABEL = 240, 10, 24
"""Smallest side of a drawn tile, space between tiles, and height of a label, in pixels."""


def overlay(
    selection: Selection,
    image: Image.Image | None = None,
    cuts: Mapping[int, Selection] = MappingProxyType({}),
    caption: Sequence[str] = (),
    tower_mask: Tensor | None = None,
) -> Image.Image:
    """Draw the kept tokens of every tile: the base tile at the left, the sub-images in their grid.

    Kept tokens are clear and outlined, dropped tokens are faded, and padding that the model removes is hatched. Tokens
    dropped inside the vision tower or the LLM are tinted with the color of their stage, which a legend names.

    Args:
        selection: the selection of the tokens that enter the LLM, with pixels.
        image: the original image, drawn to the left of the tiles.
        cuts: the selections at the cuts inside the LLM, by the first layer without dropped tokens, ascending.
        caption: lines above the drawing, such as the result of `format_caption`; long lines are wrapped.
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
    names = [_name_tile(number, cols) for number in range(len(tiles))]
    suffixes = ["" if k == g else f" of {g} granted" for k, g in zip(kept, granted, strict=True)]
    texts = [
        f"{name}: {' > '.join(map(str, numbers))} kept{suffix}"
        for name, numbers, suffix in zip(names, counts, suffixes, strict=True)
    ]
    base_width = max(width, _measure_width(texts[:1]))
    column = max(width, _measure_width(texts[1:]))
    legend = _list_legend(selection, cuts, tower_mask)
    left, scaled, heading = 0, None, ""
    if image is not None:
        heading = f"image {image.width} x {image.height}"
        scale = min(2 * width / image.width, 2 * height / image.height)
        scaled = image.convert("RGB").resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
        )
        left = max(scaled.width, _measure_width([heading])) + 3 * GAP
    sheet_width = left + base_width + (3 * GAP + cols * (column + GAP) - GAP if rows else 0)
    sheet_height = max(max(rows, 1) * (height + LABEL + GAP) - GAP, 0 if scaled is None else scaled.height + LABEL)
    sheet_width = max(sheet_width, _measure_width([text for _, text in legend]) + LABEL)
    lines = [line for text in caption for line in _wrap(text, sheet_width)]
    top = LABEL * len(lines)
    legend_top = top + sheet_height + 2 * GAP
    sheet = Image.new("RGB", (sheet_width + 2 * GAP, legend_top + LABEL * len(legend) + GAP * bool(legend)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((GAP, GAP + LABEL * number), line, INK, _load_font())
    for number, (color, text) in enumerate(legend):
        y = legend_top + LABEL * number
        outline = KEPT if color == "white" else PADDING
        pen.rectangle((GAP, y + 2, GAP + 14, y + 16), fill=None if color == HATCHED else color, outline=outline)
        if color == HATCHED:
            sheet.paste(Image.fromarray(_draw_stripes(13, 13).repeat(3, axis=2)), (GAP + 1, y + 3))
        pen.text((GAP + LABEL, y), text, INK, _load_font())
    if scaled is not None:
        pen.text((GAP, top + GAP), heading, INK, _load_font())
        sheet.paste(scaled, (GAP, top + GAP + LABEL))
    for number, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        x, y = GAP + left, top + GAP
        if number:
            row, col = divmod(number - 1, cols)
            x, y = x + base_width + 3 * GAP + col * (column + GAP), y + row * (height + LABEL + GAP)
        pen.text((x, y), text, INK, _load_font())
        sheet.paste(tile, (x, y + LABEL))
    return sheet


def format_caption(
    strategy: str, budget: str, selection: Selection, question: str | None = None, answer: str | None = None
) -> list[str]:
    """Return the lines above an overlay: strategy, budget and counts; question and answer.

    Args:
        strategy: label of the strategy.
        budget: its budget as text.
        selection: the selection of the tokens that enter the LLM.
        question: the question.
        answer: the answer with the strategy.
    """
    counts = f"{selection.kept_tokens} of {selection.geometry.valid_tokens} visual tokens enter the LLM"
    return [
        f"{strategy}, {budget}: {counts}",
        *([f"question: {question}"] if question is not None else []),
        *([f"answer: {answer}"] if answer is not None else []),
    ]


def _name_tile(number: int, cols: int) -> str:
    row, col = divmod(number - 1, max(1, cols))
    return f"row {row + 1}, col {col + 1}" if number else "base tile"


def _measure_width(texts: Sequence[str]) -> int:
    """Return the width of the widest text in pixels; 0 without texts."""
    return math.ceil(max((_load_font().getlength(text) for text in texts), default=0))


def _wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text that fit into a width in pixels."""
    size = max(10, int(len(text) * width / max(1, _measure_width([text]))))
    return textwrap.wrap(text, size) or [""]


def _list_legend(
    selection: Selection, cuts: Mapping[int, Selection], tower_mask: Tensor | None
) -> list[tuple[str, str]]:
    """Return color and text of each group of tokens: padding and, with several stages, remaining and dropped tokens."""
    padding = [] if selection.geometry.valid.all() else [(HATCHED, "padding that the model removes")]
    has_stages = bool(cuts) or tower_mask is not None
    return [*(_list_stages(selection, cuts, tower_mask) if has_stages else []), *padding]


def _list_stages(
    selection: Selection, cuts: Mapping[int, Selection], tower_mask: Tensor | None
) -> list[tuple[str, str]]:
    """Return color and text of the tokens that remain, and of those dropped at each stage."""
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


def draw_budget_bars(selection: Selection, size: tuple[float, float] | None = None) -> Figure:
    """Draw one bar per tile with the numbers of granted and kept tokens.

    Args:
        selection: the selection.
        size: width x height in inches; by default the width grows with the number of tiles.
    """
    granted, kept = selection.granted_per_tile, selection.kept_per_tile
    cols = selection.geometry.tile_grid[1]
    names = ["base"] + [f"{1 + n // cols},{1 + n % cols}" for n in range(selection.geometry.sub_images)]
    figure = Figure(figsize=size or (max(4.0, 1.4 + 0.7 * len(names)), BARS_HEIGHT), layout="constrained")
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
    selection: Selection,
    image: Image.Image | None = None,
    cuts: Mapping[int, Selection] = MappingProxyType({}),
    caption: Sequence[str] = (),
    tower_mask: Tensor | None = None,
) -> Image.Image:
    """Draw the overlay with the budget bars of the tokens that enter the LLM below it, as wide as the overlay.

    Args:
        selection: the selection, with pixels.
        image: the original image, drawn to the left of the tiles.
        cuts: the selections at the cuts inside the LLM, as in `overlay`.
        caption: lines above the drawing, as in `overlay`.
        tower_mask: the tokens whose patches remained in the vision tower, as in `overlay`.
    """
    top = overlay(selection, image, cuts, caption, tower_mask)
    figure = draw_budget_bars(selection, (max(4.0, top.width / 100), BARS_HEIGHT))
    figure.set_dpi(100)
    bars = render_figure(figure)
    sheet = Image.new("RGB", (max(top.width, bars.width), top.height + bars.height), "white")
    sheet.paste(top, (0, 0))
    sheet.paste(bars, (0, top.height))
    return sheet


def draw_mask(selection: Selection, image: Image.Image, cuts: Mapping[int, Selection] = MappingProxyType({})) -> Figure:
    """Draw the kept tokens over the original image, for papers: dropped regions are darkened.

    One panel shows the tokens of the sub-images, and one the tokens of the base tile. The positions are exact up to the
    rounding of the resized image to whole tokens. `save_figure` writes PNG, PDF or SVG.

    Args:
        selection: the selection of the tokens that enter the LLM.
        image: the original image.
        cuts: the selections at the cuts inside the LLM; only tokens that remain after the last of them are clear.
    """
    kept, geometry = [selection, *cuts.values()][-1].kept.cpu(), selection.geometry
    (tile_rows, tile_cols), (rows, cols) = geometry.tile_grid, geometry.token_grid
    masks = {"base tile" if tile_rows else "": (kept[:1], geometry.valid[:1].cpu(), (1, 1))}
    if tile_rows and geometry.valid[1:].any():
        masks = {"sub-images": (kept[1:], geometry.valid[1:].cpu(), (tile_rows, tile_cols)), **masks}
    ratio = image.height / image.width
    side = 3.2 if ratio < 2 else 2.0
    figure = Figure(figsize=(side * len(masks), min(side * ratio, 8.0) + 0.3), dpi=300, layout="constrained")
    panels = figure.subplots(1, len(masks), squeeze=False)[0]
    for axes, (name, (tokens, valid, grid)) in zip(panels, masks.items(), strict=True):
        shape = (*grid, rows, cols)
        mask, inside = (
            part.reshape(shape).permute(0, 2, 1, 3).reshape(grid[0] * rows, grid[1] * cols).numpy()
            for part in (tokens, valid)
        )
        ys, xs = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
        mask = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        veil = np.where(mask[..., None], 0.0, np.array(VEIL))
        extent = (0.0, float(image.width), float(image.height), 0.0)
        axes.imshow(np.asarray(image.convert("RGB")), extent=extent)
        axes.imshow(veil, extent=extent, interpolation="nearest")
        axes.set_title(f"{name}: {format_count(int(tokens.sum()), 'token')}".removeprefix(": "), fontsize=8)
        axes.set_axis_off()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, PDF or SVG, by the suffix of the file.

    Args:
        figure: the figure.
        path: the file.

    Raises:
        ValueError: if the suffix names another format.
        OSError: if the file cannot be written.
    """
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"{path}: a figure is written as {', '.join(FIGURE_SUFFIXES)}; give a file with such a suffix")
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix.lower().removeprefix("."))
    write_file(data.getvalue(), path)


def render_figure(figure: Figure) -> Image.Image:
    """Return a matplotlib figure as a Pillow image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_stripes(height: int, width: int) -> NDArray[np.uint8]:
    """Return the hatching of padding, uint8 `[height, width, 1]`."""
    stripes = (np.arange(height)[:, None] + np.arange(width)[None, :]) // 4 % 2
    return (stripes[..., None] * 40 + 150).astype(np.uint8)


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
    drawn = np.where(enlarge(entered.geometry.valid[number]), drawn, _draw_stripes(height, width))
    tile = Image.fromarray(drawn.round().astype(np.uint8))
    pen = ImageDraw.Draw(tile)
    for row, col in np.argwhere(kept.cpu().numpy().reshape(rows, cols)):
        top, bottom = -(-row * height // rows), -(-(row + 1) * height // rows) - 1
        left, right = -(-col * width // cols), -(-(col + 1) * width // cols) - 1
        pen.rectangle((left, top, right, bottom), outline=KEPT)
    pen.rectangle((0, 0, width - 1, height - 1), outline=PADDING)
    return tile
