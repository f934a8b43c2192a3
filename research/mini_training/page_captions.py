"""Captions of the tiles of pages, in the classes of `captions`: a name is a further shape, and a page has no paper."""

import numpy as np

from research.mini_training.captions import ANY, ILLEGIBLE, NOTHING, UNKNOWN, Caption, Integers
from research.mini_training.page_lessons import make_page_lesson
from tokenprune.models.mini.boards import SHAPES
from tokenprune.models.mini.glyphs import COLORS
from tokenprune.models.mini.pages import NAMES, PLAIN, Page

__all__ = ["MAX_PAGE_ITEMS", "describe_page_tiles", "draw_page_caption"]

MAX_PAGE_ITEMS = 24
"""Largest number of items of a tile; the base tile shows all items."""
_ABOUT_NAME = (
    *(("what number is on the {name}?", "s"), ("which item has the larger number: {name} or {other}?", "s")),
    *(("the {name}", "s"), ("the {name} has number {number}", "sn"), ("the {other} or the {name}", "s")),
    *(("which item has number {number}?", "n"), ("number {number}", "n")),
)
_ABOUT_COLOR = (
    *(("what number is on the {color} item?", "c"), ("how many items are {color}?", "c"), ("the {color} item", "c")),
    *(("is the {color} item in the left or right half?", "c"), ("is the {color} item in the top or bottom half?", "c")),
)
_ABOUT_PAGE = (("which item has the largest number?", ""), ("which item has the smallest number?", ""))


def describe_page_tiles(page: Page) -> Integers:
    """Return the content of the tiles of a page, see `train_text.Cache`, `[tiles, 1 + 24, 6]`.

    The class of a name follows the classes of the shapes. Names and numbers are illegible in the base tile.
    """
    truth = make_page_lesson(page)
    empty = [0, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING]
    contents = np.full((truth.item_masks.shape[1], 1 + MAX_PAGE_ITEMS, 6), empty, np.int64)
    for number, item in enumerate(page.items):
        color = NOTHING if item.color == PLAIN else item.color
        for tile in np.flatnonzero(truth.item_masks[number].any(-1)):
            legible = [len(SHAPES) + item.name, color, *divmod(item.number, 10)]
            text = legible if tile else [ILLEGIBLE, color, ILLEGIBLE, ILLEGIBLE]
            contents[tile, 1 + number] = [1, *text, NOTHING]
    return contents


def draw_page_caption(rng: np.random.Generator, contents: Integers) -> Caption:
    """Draw a random sentence about a tile of a page.

    Args:
        rng: The random generator.
        contents: Content of the tile, `[1 + items, 6]`, see `describe_page_tiles`.

    Returns:
        The sentence. For the base tile it is about colors, and for a tile without a colored item about names.
    """
    items = contents[contents[:, 0] == 1]
    row = items[rng.integers(len(items))] if len(items) and rng.random() < 0.95 else contents[0]
    is_item, shape, color, tens, units, _ = (int(value) for value in row)
    templates = _ABOUT_NAME * (shape >= 0) + _ABOUT_COLOR * (color >= 0) or _ABOUT_PAGE
    template, attributes = templates[rng.integers(len(templates))]
    names = NAMES[shape - len(SHAPES)], NAMES[int(rng.integers(len(NAMES)))]
    text = template.format(name=names[0], other=names[1], color=COLORS[color], number=10 * tens + units)
    if rng.random() < 0.2:
        text = UNKNOWN * int(rng.integers(1, 5)) + text
    required = (
        is_item if is_item else ANY,
        shape if "s" in attributes else ANY,
        color if "c" in attributes else ANY,
        tens if "n" in attributes else ANY,
        units if "n" in attributes else ANY,
        ANY,
    )
    return Caption(text, required)
