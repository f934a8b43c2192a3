"""The results of a question as HTML: a table of answers, and tiles with kept tokens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.cli.demo.choices import Choice, DemoConfig, build_reducer
from tokenprune.comparison import Comparison, compare
from tokenprune.display import encode_png
from tokenprune.experiments.evaluation.loading import model_inputs
from tokenprune.image_files import load_image
from tokenprune.models import mini
from tokenprune.run import Run
from tokenprune.strategies import Random


def format_tiles(run: Run) -> str:
    """Return the tiles of the first image as SVG: remaining tokens are clear, and hovering shows score and rank.

    Args:
        run: the record of a call with an image.
    """
    selection = run.selections[0].cpu()
    kept = list(run.find_cuts(0).values())[-1].kept.cpu() if run.cuts else selection.kept
    if selection.pixels is None:
        return ""
    layout = selection.geometry
    (rows, cols), (tile_rows, tile_cols) = layout.token_grid, layout.tile_grid
    scores = selection.scores
    ranks = None if scores is None else scores.flatten().argsort(descending=True, stable=True).argsort().view_as(scores)
    tiles = []
    for tile in range(layout.tiles):
        data = base64.b64encode(encode_png(Image.fromarray(selection.pixels[tile].numpy()))).decode()
        rects = []
        for token in range(layout.tokens):
            row, col = divmod(token, cols)
            state = "kept" if kept[tile, token] else "dropped" if layout.valid[tile, token] else "padding"
            text = f"row {row + 1}, col {col + 1}: {state}"
            if scores is not None and ranks is not None and state != "padding":
                text += f", score {scores[tile, token]:.4g}, rank {int(ranks[tile, token]) + 1}"
            style = 'fill="none" stroke="#D55E00"' if state == "kept" else 'fill="#EBEBEB" fill-opacity="0.8"'
            rects.append(
                f'<rect x="{col}" y="{row}" width="1" height="1" {style} stroke-width="0.06" pointer-events="all">'
                f"<title>{text}</title></rect>"
            )
        place = "1 / 1" if tile == 0 else f"{(tile - 1) // tile_cols + 1} / {(tile - 1) % tile_cols + 2}"
        tiles.append(
            f'<svg viewBox="0 0 {cols} {rows}" style="grid-area:{place};width:100%"><image width="{cols}" '
            f'height="{rows}" preserveAspectRatio="none" href="data:image/png;base64,{data}"/>{"".join(rects)}</svg>'
        )
    columns = 1 + tile_cols if tile_rows else 1
    style = f"display:grid;gap:6px;grid-template-columns:repeat({columns},minmax(0,1fr));max-width:{columns * 320}px"
    return f'<div class="tiles" style="{style}">{"".join(tiles)}</div>'


def open_image(path: str | None, config: DemoConfig) -> Image.Image:
    """Return an uploaded image, or the bundled image without a file. The size is checked before decoding.

    Args:
        path: the file; None for the bundled image.
        config: the options of the page, with the largest number of pixels.

    Raises:
        ValueError: if the file is no image, or too large.
    """
    file = path or str(mini.image_path(config.model))
    try:
        with Image.open(file) as image:
            width, height = image.size
    except (OSError, Image.DecompressionBombError):
        raise ValueError("this file is not an image that can be read; use PNG or JPEG") from None
    if width * height > config.max_megapixels * 1e6:
        raise ValueError(
            f"the image has {width} x {height} pixels; the limit is {config.max_megapixels} million pixels"
        )
    return load_image(file)


def name_upload(path: str | None, model: str = "mini") -> str:
    """Return the name of an uploaded file; empty for the bundled image, which the page copies under another path.

    Args:
        path: the file; None for the bundled image.
        model: name of the model.
    """
    is_bundled = path is None or Path(path).read_bytes() == mini.image_path(model).read_bytes()
    return "" if path is None or is_bundled else Path(path).name


def answer(
    model: Any, processor: Any, config: DemoConfig, path: str | None, question: str, choices: Sequence[Choice]
) -> tuple[Comparison, list[str]]:
    """Answer a question with all tokens and with each chosen strategy.

    Args:
        model: the model.
        processor: its processor.
        config: the options of the page.
        path: the image file; None for the bundled image.
        question: the question.
        choices: the strategies.

    Returns:
        The comparison, with all tokens first, and the HTML of each strategy: tokens, cost and overlay.

    Raises:
        ValueError: if image, question or a choice is not valid.
    """
    if not question.strip() or "<image>" in question or len(question) > 2000:
        raise ValueError("ask a question of at most 2000 characters, without <image>")
    image = open_image(path, config)
    reducers = [build_reducer(choice, config.text_tower) for choice in choices]
    inputs = model_inputs(model, processor, image, [question], "the image")
    table = compare(model, inputs, [Random(1.0), *reducers], processor=processor, max_new_tokens=config.max_new_tokens)
    table = replace(table, rows=[replace(table.rows[0], strategy="all tokens"), *table.rows[1:]])
    pages = [
        f"<h3>{escape(row.strategy)}, {escape(row.budget)}</h3>{format_tiles(run)}{run.account._repr_html_()}"
        for row, run in zip(table.rows[1:], table.runs[1:], strict=True)
    ]
    return table, pages
