"""Ground truth for training on pages: the tiles and patches that show each item of a page."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from research.mini_training.build import SIDE
from research.mini_training.lessons import IGNORE, TOKENS, Flags, Integers
from tokenprune.models.mini.glyphs import COLORS
from tokenprune.models.mini.pages import CELL, NAMES, PLAIN, Box, Item, Page, Question

__all__ = ["PAGE_DENSE", "PAGE_PLACES", "PAGE_PRESENCE", "PageLesson", "is_page_answerable", "make_page_lesson"]

PAGE_DENSE = {"name": len(NAMES) + 1, "color": len(COLORS) + 1, "tens": 11, "units": 11}
"""Number of classes of each head on patches; the last class means that nothing is shown."""
PAGE_PLACES = {"side": 2, "height": 2, "count": 5}
"""Number of classes of the heads on patches of colored items in the base tile."""
PAGE_PRESENCE = {"name": len(NAMES), "color": len(COLORS), "tens": 10, "units": 10}
"""Number of classes of the multi-label heads on the CLS token."""


@dataclass(frozen=True)
class PageLesson:
    """The ground truth of one page, base tile first.

    Attributes:
        mark_masks: Whether a patch shows the mark of an item, bool `[items, tiles, tokens]`. In the base tile these are
            the patches with an eighth of their area in the color of the item, at least one patch.
        digit_masks: Whether a patch shows the tens digit and the units digit of an item, bool
            `[2, items, tiles, tokens]`; False in the base tile. If patches of a number show both digits, the two masks
            are equal.
        item_masks: Whether a patch shows any part of an item, bool `[items, tiles, tokens]`.
        dense: Class of each patch, by head, `[tiles, tokens]`.
        presence: Whether a class is present in a tile (0 or 1), by head, `[tiles, classes]`.
        places: Half of the image with the item of a patch (0 for left or top) and number of items of its color minus 1,
            by head, `[tokens]` of the base tile.
    """

    mark_masks: Flags
    digit_masks: Flags
    item_masks: Flags
    dense: dict[str, Integers]
    presence: dict[str, Integers]
    places: dict[str, Integers]


def make_page_lesson(page: Page, *, separate_digits: bool = False) -> PageLesson:
    """Return the ground truth of the patches and the CLS token of each tile of a page.

    A tower reads words in their context: each patch of a name or of a number has the class of the name. All patches of
    an item have its color. Names and digits of the base tile are ignored, because they are too coarse.

    Args:
        page: The page.
        separate_digits: Whether a patch of a number has the class of its own digit only. If False, it has the classes
            of both digits, and one patch of a number is enough to read the number.
    """
    tiles = 1 + page.grid[0] * page.grid[1]
    shape = len(page.items), tiles, TOKENS
    labels, marks = (np.zeros(shape, dtype=bool) for _ in range(2))
    digits = np.zeros((2, *shape), dtype=bool)
    shares = np.zeros((len(page.items), TOKENS), np.float32)
    for number, item in enumerate(page.items):
        labels[number, 1:] = _mark_cells(page, [item.label])
        for place, box in enumerate(item.digits):
            digits[place, number, 1:] = _mark_cells(page, [box] if separate_digits else item.digits)
        marks[number, 1:] = _mark_cells(page, [item.mark])
        shares[number] = sum(_base_share(page, box) for box in _colored_boxes(page, item))
    marks[:, 0] = (shares >= 0.125) | (shares == shares.max(1, keepdims=True))
    values: Flags = np.asarray(digits.any(0))
    item_masks = labels | values | marks
    dense = {name: np.full((tiles, TOKENS), size - 1, dtype=np.int64) for name, size in PAGE_DENSE.items()}
    for name in ("name", "tens", "units"):
        dense[name][0] = IGNORE
    is_colored = np.array([item.color != PLAIN for item in page.items])
    dense["color"][0][(shares[is_colored] > 0.03).any(0)] = IGNORE
    presence = {name: np.zeros((tiles, size), dtype=np.int64) for name, size in PAGE_PRESENCE.items()}
    places = {name: np.full(TOKENS, IGNORE, dtype=np.int64) for name in PAGE_PLACES}
    height, width = page.pixels.shape[:2]
    owner = shares.argmax(0)
    for number, item in enumerate(page.items):
        tens, units = divmod(item.number, 10)
        dense["name"][labels[number] | values[number]] = item.name
        dense["tens"][digits[0, number]], dense["units"][digits[1, number]] = tens, units
        shows_digits, shows_item = values[number].any(-1), item_masks[number].any(-1)
        presence["name"][shows_digits, item.name] = 1
        presence["tens"][shows_digits, tens], presence["units"][shows_digits, units] = 1, 1
        if item.color == PLAIN:
            continue
        item_masks_of_item = item_masks[number].copy()
        item_masks_of_item[0] &= owner == number
        dense["color"][item_masks_of_item] = item.color
        presence["color"][shows_item, item.color] = 1
        base = item_masks_of_item[0]
        y, x = (item.mark[0] + item.mark[2]) / 2, (item.mark[1] + item.mark[3]) / 2
        if abs(x - width / 2) >= CELL:
            places["side"][base] = int(x > width / 2)
        if abs(y - height / 2) >= CELL:
            places["height"][base] = int(y > height / 2)
        places["count"][base] = sum(same.color == item.color for same in page.items) - 1
    return PageLesson(marks, digits, item_masks, dense, presence, places)


def _colored_boxes(page: Page, item: Item) -> list[Box]:
    """Return the boxes that have the color of an item."""
    if page.layout in ("chart", "map"):
        return [item.mark]
    boxes = (item.label, item.value, item.mark)
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    return [(min(tops), min(lefts), max(bottoms), max(rights))]


def _mark_cells(page: Page, boxes: Sequence[Box]) -> Flags:
    """Return which patches of the sub-images boxes touch, bool `[sub_images, tokens]`."""
    rows, columns = page.grid
    canvas = np.zeros((rows * SIDE, columns * SIDE), dtype=bool)
    row, column = page.offset[0] // CELL, page.offset[1] // CELL
    for top, left, bottom, right in boxes:
        canvas[row + top // CELL : row + -(-bottom // CELL), column + left // CELL : column + -(-right // CELL)] = True
    return canvas.reshape(rows, SIDE, columns, SIDE).transpose(0, 2, 1, 3).reshape(rows * columns, TOKENS)


def _base_share(page: Page, box: Box) -> np.ndarray:
    """Return the share of each patch of the base tile that a box covers, `[tokens]`."""

    def overlap(start: int, stop: int, extent: int) -> np.ndarray:
        edges = np.linspace(0, extent, SIDE + 1, dtype=np.float32)
        inside = np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)
        return np.maximum(inside, np.float32(0)) * np.float32(SIDE / extent)

    height, width = page.pixels.shape[:2]
    return np.outer(overlap(box[0], box[2], height), overlap(box[1], box[3], width)).reshape(-1)


def is_page_answerable(question: Question, truth: PageLesson, kept: Flags) -> bool:
    """Return whether the kept tokens still show the answer of a question.

    A question about names and numbers requires a token of each digit of the number of each item. A place requires a
    token of the mark in the base tile, and a count a token of each mark in the base tile or in the sub-images.

    Args:
        question: The question.
        truth: The ground truth of the page.
        kept: The kept tokens, bool `[tiles, tokens]`.
    """
    if question.needs == "tiles":
        return bool((truth.digit_masks[:, list(question.about)] & kept).any((-2, -1)).all())
    kept_of_items = truth.mark_masks[list(question.about)] & kept
    if question.type in PAGE_PLACES and question.type != "count":
        kept_of_items = kept_of_items[:, :1]
    return bool(kept_of_items.any((-2, -1)).all())
