"""Pages: seeded images of dense sheets and questions, a second world beside `tokenprune.models.mini.boards`.

A page is a form, a receipt, a table, a chart or a map with 8 to 24 items. An item has a name of three letters, a
two-digit number, and a mark: a bullet, a bar or an icon, which is colored or plain. No name and no number occurs twice
on a page. Between the items there is clutter that no question is about: fine print, rules, barcodes, stamps and
watermarks. Items and clutter cover 30 to 60 % of the patches, so a small token budget cannot hold everything.

The layout uses cells of 8 x 8 pixels, the patches of the embedded model: every letter and every digit has its own cell.
An item lies inside one tile of an AnyRes model. Letters and digits are legible in the tiles and not in the downscaled
base tile; colored marks are visible in both, and a tile does not contain its position in the image.

Two pages with the same ``(split, index)`` are equal. As for boards, the contents of a page (its layout and the set of
its name, number and color triples) are hashed, and one sixteenth of all hash values belongs to ``heldout``.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.models.mini.boards import SHAPES, TILE, Needs, Split, stencil
from tokenprune.models.mini.glyphs import COLORS, DIGITS, GLYPH_SIZE, LETTERS, RGB

__all__ = [
    "CELL",
    "GRIDS",
    "LAYOUTS",
    "NAMES",
    "PLAIN",
    "Item",
    "Page",
    "Question",
    "list_words",
    "make_demo",
    "make_page",
    "pages",
]

Box: TypeAlias = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels of the image, or in cells."""
Layout = Literal["form", "receipt", "table", "chart", "map"]

CELL = 8
"""Side of a cell in pixels."""
GRIDS: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2))
"""Tile grids as (rows, columns)."""
LAYOUTS: tuple[Layout, ...] = ("form", "receipt", "table", "chart", "map")
# fmt: off
NAMES = (
    "ant", "ape", "bag", "bee", "box", "cow", "cup", "dog", "elk", "gem", "hat", "hen", "ice", "jar", "key", "kit",
    "map", "nut", "oil", "pig", "rug", "rye", "saw", "sky", "sun", "tea", "tie", "urn", "van", "web", "yak", "zip",
)
# fmt: on
"""Names of items. Two names differ in at least two letters."""
PLAIN = len(COLORS)
"""The color of an item without a color."""

_GRID_SHARES = (0.12, 0.12, 0.2, 0.12, 0.12, 0.16, 0.16)
_SIDE = TILE // CELL
_MIN_ITEMS, _MAX_ITEMS, _MAX_PER_TILE = 8, 24, 5
_CONTENT_SHARES = (0.36, 0.56)
_MAX_CONTENT = 0.6
_COMPARED_GAP = 10
_EXTREME_GAP = 5
_DOMAIN = 0x70616765
_HELDOUT_SHARE = 16
_WORDS = """
user assistant : ? what number is on the which item has largest smallest larger or in left right half top bottom how
many items are
"""


@dataclass(frozen=True)
class Item:
    """An entry of a page.

    Attributes:
        name: Index into `NAMES`.
        number: Its number, 10 to 99.
        color: Index into `COLORS`, or `PLAIN`.
        label: The box of the name, three cells wide.
        digits: The boxes of the tens digit and of the units digit.
        mark: The box of the bullet, bar or icon.
    """

    name: int
    number: int
    color: int
    label: Box
    digits: tuple[Box, Box]
    mark: Box

    @property
    def value(self) -> Box:
        """The box of both digits."""
        (top, left, _, _), (_, _, bottom, right) = self.digits
        return top, left, bottom, right


@dataclass(frozen=True)
class Question:
    """A question about a page.

    Attributes:
        text: The question.
        answer: The one correct answer.
        type: ``value``, ``name``, ``color_value``, ``largest``, ``smallest``, ``compare``, ``count``, ``side`` or
            ``height``.
        needs: The tiles that show the answer: ``tiles`` (only the full-resolution tiles), ``base`` (only the base tile,
            because a tile does not contain its position in the image) or ``either``.
        about: Indices of the items that carry the answer. For the largest and the smallest number this is the item of
            the answer only, although the question requires a comparison with all other items.
        evidence: The boxes that show the answer, in pixels of the image: name and digits of each item in `about`, its
            mark if the question is about a color. All of them are necessary.
    """

    text: str
    answer: str
    type: str
    needs: Needs
    about: tuple[int, ...]
    evidence: tuple[Box, ...]


@dataclass(frozen=True)
class Page:
    """An image with its items and its questions.

    Attributes:
        pixels: The image `[height, width, 3]`, uint8.
        grid: Rows and columns of the tiles that it fills.
        offset: Vertical and horizontal padding that AnyRes puts before the image, in pixels; a multiple of `CELL`.
        layout: The kind of sheet.
        items: The items.
        content: Whether a cell shows an item or clutter, bool `[height / CELL, width / CELL]`.
        questions: The questions, by default at most four of each type.
        index: The number of the page within the split.
        split: ``train`` or ``heldout``.
    """

    pixels: NDArray[np.uint8]
    grid: tuple[int, int]
    offset: tuple[int, int]
    layout: Layout
    items: tuple[Item, ...]
    content: NDArray[np.bool_]
    questions: tuple[Question, ...]
    index: int
    split: Split

    @property
    def image(self) -> Image.Image:
        """The image as a Pillow image."""
        return Image.fromarray(self.pixels)

    def find_tiles(self, boxes: Sequence[Box]) -> set[tuple[int, int]]:
        """Return (row, column) of the tiles that show the top left corners of boxes."""
        down, across = self.offset
        return {((top + down) // TILE, (left + across) // TILE) for top, left, _, _ in boxes}


@dataclass(frozen=True)
class _Slot:
    """The place of an item: its top left cell in the image, and its parts in cells relative to it.

    Attributes:
        cell: Row and column of the top left cell.
        size: Rows and columns of all cells of the item.
        label: Row and column of the first letter.
        digits: Row and column of the tens digit.
        mark: Box of the mark.
    """

    cell: tuple[int, int]
    size: tuple[int, int]
    label: tuple[int, int]
    digits: tuple[int, int]
    mark: Box


def make_page(
    index: int,
    split: Split = "heldout",
    *,
    grid: tuple[int, int] | None = None,
    layout: Layout | None = None,
    per_type: int = 4,
) -> Page:
    """Draw a page.

    Args:
        index: The number of the page; equal numbers give equal pages.
        split: ``train`` or ``heldout``.
        grid: Rows and columns of tiles, one of `GRIDS`; None draws them at random.
        layout: The kind of sheet; None draws it at random.
        per_type: Largest number of questions of each type; they are drawn at random.

    Returns:
        The page.
    """
    rng = np.random.default_rng(np.random.SeedSequence([_DOMAIN, int(split == "heldout"), index]))
    drawn_grid = GRIDS[int(rng.choice(len(GRIDS), p=_GRID_SHARES))]
    drawn_layout = LAYOUTS[int(rng.integers(len(LAYOUTS)))]
    grid, layout = grid or drawn_grid, layout or drawn_layout
    rows, columns = grid[0] * _SIDE, grid[1] * _SIDE
    if rng.random() < 0.25:  # two cells shorter on one side, so that AnyRes pads one cell at each end
        if rng.random() < 0.5:
            rows -= 2
        else:
            columns -= 2
    offset = (grid[0] * _SIDE - rows) // 2, (grid[1] * _SIDE - columns) // 2
    slots = _place_items(rng, layout, _split_into_tiles(grid, (rows, columns), offset))
    contents = _draw_contents(rng, len(slots))
    while _find_split(layout, contents) != split:
        contents = _draw_contents(rng, len(slots))
    items = tuple(_make_item(slot, *triple, layout) for slot, triple in zip(slots, contents, strict=True))
    pixels, content = _render(rng, items, slots, layout, (rows, columns))
    height, width = CELL * rows, CELL * columns
    questions = tuple(_draw_questions(rng, items, grid, (height, width), per_type))
    return Page(pixels, grid, (CELL * offset[0], CELL * offset[1]), layout, items, content, questions, index, split)


def pages(count: int, split: Split = "heldout", start: int = 0) -> Iterator[Page]:
    """Yield pages ``start`` to ``start + count - 1`` of a split.

    Args:
        count: Number of pages.
        split: ``train`` or ``heldout``.
        start: The first index.

    Yields:
        The pages in order.
    """
    for index in range(start, start + count):
        yield make_page(index, split)


def make_demo() -> Page:
    """Return the page of the bundled image: a table with 3 x 2 tiles, selected from twelve held-out pages."""
    return make_page(10, "heldout")


def list_words() -> list[str]:
    """Return every word and sign of the questions and answers except digits, in a fixed order."""
    return [*_WORDS.split(), *COLORS, *NAMES]


# --- contents ---------------------------------------------------------------------------------------------------------


def _find_split(layout: Layout, contents: list[tuple[int, int, int]]) -> Split:
    text = layout + ";".join(",".join(map(str, triple)) for triple in sorted(contents))
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return "heldout" if value % _HELDOUT_SHARE == 0 else "train"


def _draw_contents(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """Return name, number and color of each item.

    The largest and the smallest number differ by at least `_EXTREME_GAP` from all other numbers. One or two colors
    occur once, so that a color can identify an item.
    """
    names = rng.permutation(len(NAMES))[:count]
    smallest, largest = int(rng.integers(10, 30)), int(rng.integers(80, 100))
    between = np.arange(smallest + _EXTREME_GAP, largest - _EXTREME_GAP + 1)
    numbers = rng.permutation([smallest, largest, *rng.permutation(between)[: count - 2]])
    order = rng.permutation(len(COLORS))
    n_single = int(rng.integers(1, 3))
    colors = list(order[:n_single])
    for color in order[n_single:4]:
        colors += [color] * int(rng.integers(2, 6))
    colors = (colors + [PLAIN] * count)[:count]
    colors = [colors[index] for index in rng.permutation(count)]
    return [(int(n), int(v), int(c)) for n, v, c in zip(names, numbers, colors, strict=True)]


# --- layout -----------------------------------------------------------------------------------------------------------


def _split_into_tiles(grid: tuple[int, int], size: tuple[int, int], offset: tuple[int, int]) -> list[Box]:
    """Return the cells of the image that each tile shows, as boxes in cells."""
    return [
        (
            max(row * _SIDE - offset[0], 0),
            max(column * _SIDE - offset[1], 0),
            min((row + 1) * _SIDE - offset[0], size[0]),
            min((column + 1) * _SIDE - offset[1], size[1]),
        )
        for row in range(grid[0])
        for column in range(grid[1])
    ]


def _place_items(rng: np.random.Generator, layout: Layout, tiles: Sequence[Box]) -> list[_Slot]:
    """Return the slots of the items, in reading order of each tile."""
    slots_of_tiles = [_list_slots(rng, layout, tile) for tile in tiles]
    limit = min(_MAX_ITEMS, sum(map(len, slots_of_tiles)))
    count = int(rng.integers(max(_MIN_ITEMS, 3 * len(tiles)), limit + 1))
    candidates = [(tile, slot) for tile, slots in enumerate(slots_of_tiles) for slot in range(len(slots))]
    chosen = sorted(int(number) for number in rng.permutation(len(candidates))[:count])
    return [slots_of_tiles[tile][slot] for tile, slot in (candidates[number] for number in chosen)]


def _list_slots(rng: np.random.Generator, layout: Layout, tile: Box) -> list[_Slot]:
    """Return at most five slots in a tile: lines, or for a map blocks of two lines."""
    top, left, bottom, right = tile
    height, width = bottom - top, right - left
    if layout == "map":
        places = [(2 * row, 5 * column) for row in range(height // 2) for column in range(width // 5)]
        chosen = sorted(int(number) for number in rng.permutation(len(places))[:_MAX_PER_TILE])
        shift = int(rng.integers(width % 5 + 1)), int(rng.integers(height % 2 + 1))
        return [
            _Slot((top + row + shift[1], left + column + shift[0]), (2, 5), (0, 2), (1, 2), (0, 0, 2, 2))
            for row, column in (places[number] for number in chosen)
        ]
    gap = int(rng.integers(1, min(3, width - 6) + 1))
    length = {"form": 7, "receipt": 6 + gap, "table": 6, "chart": 5 + gap}[layout]
    indent = int(rng.integers(width - length + 1))
    lines = range(int(rng.integers(height - 2 * min(_MAX_PER_TILE, (height + 1) // 2) + 2)), height, 2)
    return [_make_line((top + line, left + indent), layout, gap) for line in lines[:_MAX_PER_TILE]]


def _make_line(cell: tuple[int, int], layout: Layout, gap: int) -> _Slot:
    """Return the slot of an item that fills one line.

    Args:
        cell: Row and column of its first cell.
        layout: The kind of sheet.
        gap: Length in cells of the leader of a receipt and of the longest bar of a chart.
    """
    if layout == "receipt":  # name, leader, number, bullet
        return _Slot(cell, (1, 6 + gap), (0, 0), (0, 3 + gap), (0, 5 + gap, 1, 6 + gap))
    if layout == "chart":  # name, bar, number
        return _Slot(cell, (1, 5 + gap), (0, 0), (0, 3 + gap), (0, 3, 1, 3 + gap))
    if layout == "form":  # bullet, name, gap, number
        return _Slot(cell, (1, 7), (0, 1), (0, 5), (0, 0, 1, 1))
    return _Slot(cell, (1, 6), (0, 1), (0, 4), (0, 0, 1, 1))  # table: bullet, name, number


def _make_item(slot: _Slot, name: int, number: int, color: int, layout: Layout) -> Item:
    """Return the item of a slot with its boxes in pixels."""

    def box(top: int, left: int, bottom: int, right: int) -> Box:
        row, column = slot.cell
        return CELL * (row + top), CELL * (column + left), CELL * (row + bottom), CELL * (column + right)

    (label_row, label_column), (row, column) = slot.label, slot.digits
    tens, units = box(row, column, row + 1, column + 1), box(row, column + 1, row + 1, column + 2)
    mark = box(*slot.mark)
    if layout == "chart":  # the length of a bar shows the number
        top, left, bottom, right = mark
        mark = top, left, bottom, left + max(CELL // 2, round((right - left) * number / 100))
    return Item(name, number, color, box(label_row, label_column, label_row + 1, label_column + 3), (tens, units), mark)


# --- drawing ----------------------------------------------------------------------------------------------------------


def _render(
    rng: np.random.Generator, items: Sequence[Item], slots: Sequence[_Slot], layout: Layout, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the pixels of a page, uint8 `[height, width, 3]`, and its cells with content, bool `[rows, columns]`."""
    rows, columns = size
    paper = rng.uniform(224, 248) + rng.uniform(-6, 6, size=3)
    sheet = np.empty((rows * CELL, columns * CELL, 3), np.float32)
    sheet[:] = paper
    ink = rng.uniform(10, 60)
    shift = int(rng.integers(2)), int(rng.integers(1, 3))
    content = np.zeros(size, dtype=bool)
    for item, slot in zip(items, slots, strict=True):
        (row, column), (height, width) = slot.cell, slot.size
        content[row : row + height, column : column + width] = True
        _draw_frame(sheet, item, slot, layout, ink)
        _draw_mark(rng, sheet, item, layout)
        top, left, _, _ = item.label
        for number, letter in enumerate(NAMES[item.name]):
            _draw_glyph(sheet, LETTERS[letter], (top + shift[0], left + CELL * number + shift[1]), ink)
        for digit, (top, left, _, _) in zip(divmod(item.number, 10), item.digits, strict=True):
            _draw_glyph(sheet, DIGITS[digit], (top + shift[0], left + shift[1]), ink)
    _add_clutter(rng, sheet, content, float(paper.mean()))
    sheet += rng.standard_normal((*sheet.shape[:2], 1), dtype=np.float32) * rng.uniform(1, 6)
    return np.clip(sheet, 0, 255).astype(np.uint8), content


def _draw_glyph(sheet: NDArray[np.float32], glyph: NDArray[np.float32], corner: tuple[int, int], ink: float) -> None:
    """Blend a glyph into the sheet at a corner (top, left)."""
    (top, left), (height, width) = corner, GLYPH_SIZE
    area = sheet[top : top + height, left : left + width]
    area += glyph[..., None] * (ink - area)


def _draw_frame(sheet: NDArray[np.float32], item: Item, slot: _Slot, layout: Layout, ink: float) -> None:
    """Draw the fixed parts of an item: the tint of a colored line, leaders, and the lines of forms and tables."""
    row, column = slot.cell
    top, left, bottom, right = (CELL * k for k in (row, column, row + slot.size[0], column + slot.size[1]))
    if item.color != PLAIN and layout in ("form", "receipt", "table"):
        area = sheet[top:bottom, left:right]
        area += 0.45 * (RGB[item.color] - area)
    if layout == "receipt":
        sheet[bottom - 3 : bottom - 2, item.label[3] + 2 : item.digits[0][1] - 1 : 3] = ink + 40
    if layout == "form":
        sheet[bottom - 1, item.value[1] : right] = ink + 40
    if layout == "table":
        sheet[bottom - 1, left:right] = ink + 60
        for edge in (item.label[1], item.digits[0][1]):
            sheet[top:bottom, edge] = ink + 60


def _draw_mark(rng: np.random.Generator, sheet: NDArray[np.float32], item: Item, layout: Layout) -> None:
    """Draw the bullet, bar or icon of an item, gray if the item is plain."""
    top, left, bottom, right = item.mark
    paint = (RGB[item.color] if item.color != PLAIN else np.full(3, 105, np.float32)) + rng.uniform(-12, 12, size=3)
    if layout == "map":
        alpha = stencil(int(rng.integers(len(SHAPES))), bottom - top)[..., None]
        sheet[top:bottom, left:right] += alpha * (paint - sheet[top:bottom, left:right])
    else:
        sheet[top + 1 : bottom - 1, left + (layout != "chart") : right - 1] = paint


def _add_clutter(
    rng: np.random.Generator, sheet: NDArray[np.float32], content: NDArray[np.bool_], paper: float
) -> None:
    """Draw clutter into free cells until the share of cells with content is reached, and mark them in `content`."""
    rows, columns = content.shape
    target = rng.uniform(*_CONTENT_SHARES) * content.size
    limit = _MAX_CONTENT * content.size
    for trial in range(400):
        if content.sum() >= target and trial >= 10:
            break
        kind = int(rng.integers(5))
        height, width = ((1, int(rng.integers(2, 6))), (1, 3), (1, int(rng.integers(2, 6))), (2, 2), (2, 3))[kind]
        row, column = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        cells = content[row : row + height, column : column + width]
        if cells.any() or content.sum() + cells.size > limit:
            continue
        cells[:] = True
        area = sheet[CELL * row : CELL * (row + height), CELL * column : CELL * (column + width)]
        _CLUTTER[kind](rng, area, paper)


def _draw_fine_print(rng: np.random.Generator, area: NDArray[np.float32], paper: float) -> None:
    """Draw two lines of strokes that are too small to be letters."""
    for top in (1, 5):
        strokes = rng.random((2, area.shape[1] - 2)) < 0.55
        area[top : top + 2, 1:-1][strokes] = paper - rng.uniform(60, 110)


def _draw_barcode(rng: np.random.Generator, area: NDArray[np.float32], paper: float) -> None:
    """Draw vertical bars."""
    bars = rng.random(area.shape[1] - 2) < 0.5
    area[1:-1, 1:-1][:, bars] = paper - rng.uniform(120, 190)


def _draw_rule(rng: np.random.Generator, area: NDArray[np.float32], paper: float) -> None:
    """Draw one or two horizontal rules."""
    for top in rng.permutation(np.arange(1, area.shape[0] - 1))[: int(rng.integers(1, 3))]:
        area[top, 1:-1] = paper - rng.uniform(70, 150)


def _draw_stamp(rng: np.random.Generator, area: NDArray[np.float32], paper: float) -> None:
    """Draw a pale ring with a letter."""
    ys, xs = np.ogrid[: area.shape[0], : area.shape[1]]
    radius = np.hypot(ys - (area.shape[0] - 1) / 2, xs - (area.shape[1] - 1) / 2)
    tone = paper - rng.uniform(50, 90)
    area[(radius < 7.6) & (radius > 5.8)] = tone
    _draw_glyph(area, list(LETTERS.values())[int(rng.integers(len(LETTERS)))], (5, 6), tone)


def _draw_watermark(rng: np.random.Generator, area: NDArray[np.float32], paper: float) -> None:
    """Draw a pale letter at twice the size."""
    glyph = list(LETTERS.values())[int(rng.integers(len(LETTERS)))].repeat(2, 0).repeat(2, 1)
    left = int(rng.integers(1, area.shape[1] - glyph.shape[1]))
    area[1 : 1 + glyph.shape[0], left : left + glyph.shape[1]] -= rng.uniform(20, 45) * glyph[..., None]


_CLUTTER = (_draw_fine_print, _draw_barcode, _draw_rule, _draw_stamp, _draw_watermark)


# --- questions --------------------------------------------------------------------------------------------------------


def _draw_questions(
    rng: np.random.Generator, items: Sequence[Item], grid: tuple[int, int], size: tuple[int, int], per_type: int
) -> Iterator[Question]:
    """Yield at most `per_type` random questions of each type, in a fixed order of types."""
    candidates: dict[str, list[Question]] = {}
    for question in _list_questions(items, grid, size):
        candidates.setdefault(question.type, []).append(question)
    for questions in candidates.values():
        for number in sorted(rng.permutation(len(questions))[:per_type]):
            yield questions[number]


def _list_questions(items: Sequence[Item], grid: tuple[int, int], size: tuple[int, int]) -> Iterator[Question]:
    """Yield every question that has a unique answer."""
    texts = [(item.label, item.value) for item in items]
    for index, item in enumerate(items):
        name, number = NAMES[item.name], str(item.number)
        yield Question(f"What number is on the {name}?", number, "value", "tiles", (index,), texts[index])
        yield Question(f"Which item has number {number}?", name, "name", "tiles", (index,), texts[index])
    order = sorted(range(len(items)), key=lambda index: items[index].number)
    for kind, index in (("smallest", order[0]), ("largest", order[-1])):
        text = f"Which item has the {kind} number?"
        yield Question(text, NAMES[items[index].name], kind, "tiles", (index,), texts[index])
    for first, second in ((i, j) for i in range(len(items)) for j in range(len(items))):
        gap = items[first].number - items[second].number
        if abs(gap) >= _COMPARED_GAP:
            names = NAMES[items[first].name], NAMES[items[second].name]
            text = f"Which item has the larger number: {names[0]} or {names[1]}?"
            evidence = (*texts[first], *texts[second])
            yield Question(text, names[int(gap < 0)], "compare", "tiles", (first, second), evidence)
    for color, word in enumerate(COLORS):
        about = tuple(index for index, item in enumerate(items) if item.color == color)
        marks = tuple(items[index].mark for index in about)
        if about:
            yield Question(f"How many items are {word}?", str(len(about)), "count", "either", about, marks)
        if len(about) == 1:
            yield from _ask_about_color(items[about[0]], about, word, grid, size)


def _ask_about_color(
    item: Item, about: tuple[int, ...], word: str, grid: tuple[int, int], size: tuple[int, int]
) -> Iterator[Question]:
    """Yield the questions about the only item of a color: its number and its half of the image."""
    text = f"What number is on the {word} item?"
    yield Question(text, str(item.number), "color_value", "tiles", about, (item.mark, item.value))
    y, x = (item.mark[0] + item.mark[2]) / 2, (item.mark[1] + item.mark[3]) / 2
    # A tile does not contain its position, so only the base tile shows a side that spans several tiles.
    if abs(x - size[1] / 2) >= CELL:
        needs: Needs = "base" if grid[1] > 1 else "either"
        text, answer = f"Is the {word} item in the left or right half?", "left" if x < size[1] / 2 else "right"
        yield Question(text, answer, "side", needs, about, (item.mark,))
    if abs(y - size[0] / 2) >= CELL:
        needs = "base" if grid[0] > 1 else "either"
        text, answer = f"Is the {word} item in the top or bottom half?", "top" if y < size[0] / 2 else "bottom"
        yield Question(text, answer, "height", needs, about, (item.mark,))
