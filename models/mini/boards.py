"""Notice boards: seeded images and questions, small enough to be drawn on the fly.

A board is a sheet of paper with one to four colored shapes. Every shape carries a white plate with a two-digit
number, legible in the full-resolution tiles of an AnyRes model and not in its downscaled base tile. No shape and no
color occurs twice on a board. Most of the paper is empty, as in a document, so that a small token budget can suffice.

Two boards with the same ``(split, index)`` are equal. By construction the splits share no board: the contents of a
board (the set of its shape, color and number triples) are hashed. One sixteenth of all hash values belongs to
``heldout``, all other values belong to ``train``. If the contents belong to the wrong split, they are drawn again.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tokenprune.models.mini.glyphs import COLORS, DIGITS, RGB

__all__ = [
    "COLORS",
    "GRIDS",
    "PAPERS",
    "SHAPES",
    "TILE",
    "Board",
    "Item",
    "Question",
    "all_words",
    "boards",
    "make_board",
    "make_demo",
    "stencil",
]

Split = Literal["train", "heldout"]
Needs = Literal["tiles", "base", "either"]

TILE = 80
"""Side of a tile in pixels."""
GRIDS: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
"""Tile grids as (rows, columns)."""
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
PAPERS = ("plain", "ruled", "dotted", "graded")

_GRID_SHARES = (0.15, 0.15, 0.4, 0.15, 0.15)
_MAX_ITEMS = {(1, 2): 2, (2, 1): 2, (2, 2): 4, (1, 3): 3, (3, 1): 3}
_SIZES = (24, 28)
_PLATE = (9, 13)
_DOMAIN = 0x626F6172
_HELDOUT_SHARE = 16

_WORDS = """
user assistant : ? . what number is on the shape color how many shapes are there in left or right half top bottom
of paper it this yes no
"""


@dataclass(frozen=True)
class Item:
    """One shape on a board.

    Attributes:
        shape: Index into `SHAPES`.
        color: Index into `COLORS`.
        number: The two-digit number on its plate, 10 to 99.
        box: Top, left, bottom, right in pixels of the image.
        digits: The boxes of the tens digit and of the units digit, in pixels of the image.
    """

    shape: int
    color: int
    number: int
    box: tuple[int, int, int, int]
    digits: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]

    @property
    def name(self) -> str:
        """Color and shape in words."""
        return f"{COLORS[self.color]} {SHAPES[self.shape]}"

    @property
    def center(self) -> tuple[float, float]:
        """Vertical and horizontal center in pixels."""
        top, left, bottom, right = self.box
        return (top + bottom) / 2, (left + right) / 2


@dataclass(frozen=True)
class Question:
    """A question about a board.

    Attributes:
        text: The question.
        answer: The one correct answer.
        type: ``number_pair``, ``number_shape``, ``number_color``, ``color``, ``shape``, ``count``, ``side``,
            ``height``, ``paper``, or on demand ``order``.
        needs: The tiles that show the answer: ``tiles`` (only the full-resolution tiles), ``base`` (only the base tile,
            because a tile does not contain its position in the image) or ``either``.
        about: Indices of the items that the answer depends on.
    """

    text: str
    answer: str
    type: str
    needs: Needs
    about: tuple[int, ...]


@dataclass(frozen=True)
class Board:
    """An image with its items and all questions that can be asked about it.

    Attributes:
        pixels: The image `[height, width, 3]`, uint8.
        grid: Rows and columns of the tiles that it fills.
        offset: Vertical and horizontal padding that AnyRes puts before the image, in pixels.
        paper: Index into `PAPERS`.
        items: The shapes on the board.
        questions: All questions about the board.
        index: The number of the board within the split.
        split: ``train`` or ``heldout``.
    """

    pixels: NDArray[np.uint8]
    grid: tuple[int, int]
    offset: tuple[int, int]
    paper: int
    items: tuple[Item, ...]
    questions: tuple[Question, ...]
    index: int
    split: Split

    @property
    def image(self) -> Image.Image:
        """The image as a Pillow image."""
        return Image.fromarray(self.pixels)


def make_board(
    index: int,
    split: Split = "heldout",
    *,
    grid: tuple[int, int] | None = None,
    items: int | None = None,
    crowded: bool = False,
    places: bool = True,
    orders: bool = False,
) -> Board:
    """Draw a board.

    Args:
        index: The number of the board; equal numbers give equal boards.
        split: ``train`` or ``heldout``.
        grid: Rows and columns of tiles, one of `GRIDS`; None draws them at random.
        items: Number of shapes; None draws it at random.
        crowded: Whether the board has many more shapes, with repeats and without questions (to train a vision tower).
        places: Whether to include questions about the half of the image that contains a shape (``side``, ``height``).
        orders: Whether to include questions about the order of two shapes from left to right (``order``). The shipped
            model did not learn to answer them in a part of its training, so they are omitted by default.

    Returns:
        The board.
    """
    seeds = [_DOMAIN, int(split == "heldout"), int(crowded), index]
    rng = np.random.default_rng(np.random.SeedSequence(seeds))
    rows, columns = GRIDS[int(rng.choice(len(GRIDS), p=_GRID_SHARES))] if grid is None else grid
    height, width = rows * TILE, columns * TILE
    if rng.random() < 0.25:
        share = rng.uniform(0.8, 0.97)
        if rng.random() < 0.5:
            height = int(height * share)
        else:
            width = int(width * share)
    offset = ((rows * TILE - height) // 2, (columns * TILE - width) // 2)
    paper = int(rng.integers(len(PAPERS)))
    max_items = _MAX_ITEMS.get((rows, columns), 4)
    # The larger of two draws, because a board with one shape has few questions.
    count = int(rng.integers(1, max_items + 1, size=2).max()) if items is None else items
    if crowded:
        count = 2 * rows * columns + int(rng.integers(rows * columns + 1))
    contents = _draw_contents(rng, count, crowded=crowded)
    while not crowded and _find_split(contents) != split:
        contents = _draw_contents(rng, count, crowded=crowded)
    placed = tuple(_place_items(rng, contents, (rows, columns), (height, width), offset))
    pixels = _render(rng, placed, paper, (height, width))
    candidates = _generate_questions(rng, placed, paper, (rows, columns), (height, width), places=places, orders=orders)
    questions = () if crowded else tuple(candidates)
    return Board(pixels, (rows, columns), offset, paper, placed, questions, index, split)


def boards(count: int, split: Split = "heldout", start: int = 0) -> Iterator[Board]:
    """Yield boards ``start`` to ``start + count - 1`` of a split.

    Args:
        count: Number of boards.
        split: ``train`` or ``heldout``.
        start: The first index.

    Yields:
        The boards in order.
    """
    for index in range(start, start + count):
        yield make_board(index, split)


def make_demo() -> Board:
    """Return the board of the bundled image: 2 x 2 tiles, four shapes, selected from ten held-out boards."""
    return make_board(6, "heldout", grid=(2, 2), items=4)


def all_words() -> list[str]:
    """Return every word and sign of the questions and answers except digits, in a fixed order."""
    return [*_WORDS.split(), *SHAPES, *COLORS, *PAPERS]


def _find_split(contents: list[tuple[int, int, int]]) -> Split:
    text = ";".join(",".join(map(str, triple)) for triple in sorted(contents))
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return "heldout" if value % _HELDOUT_SHARE == 0 else "train"


def _draw_contents(rng: np.random.Generator, count: int, *, crowded: bool) -> list[tuple[int, int, int]]:
    if crowded:
        shapes, colors = rng.integers(len(SHAPES), size=count), rng.integers(len(COLORS), size=count)
    else:
        shapes, colors = rng.permutation(len(SHAPES))[:count], rng.permutation(len(COLORS))[:count]
    numbers = rng.integers(10, 100, size=count)
    return [(int(s), int(c), int(n)) for s, c, n in zip(shapes, colors, numbers, strict=True)]


def _place_items(
    rng: np.random.Generator,
    contents: list[tuple[int, int, int]],
    grid: tuple[int, int],
    size: tuple[int, int],
    offset: tuple[int, int],
) -> Iterator[Item]:
    """Place each item inside one tile, because a tower that encodes single tiles cannot read a divided number."""
    boxes: list[tuple[int, int, int, int]] = []
    for shape, color, number in contents:
        for _ in range(200):
            side = int(rng.integers(_SIZES[0], _SIZES[1] + 1))
            row, column = int(rng.integers(grid[0])), int(rng.integers(grid[1]))
            low = max(row * TILE - offset[0], 0) + 1, max(column * TILE - offset[1], 0) + 1
            high = min((row + 1) * TILE - offset[0], size[0]) - 1, min((column + 1) * TILE - offset[1], size[1]) - 1
            if high[0] - low[0] < side or high[1] - low[1] < side:
                continue
            top = int(rng.integers(low[0], high[0] - side + 1))
            left = int(rng.integers(low[1], high[1] - side + 1))
            if all(
                top + side + 2 <= t or b + 2 <= top or left + side + 2 <= x or r + 2 <= left for t, x, b, r in boxes
            ):
                break
        else:
            continue
        boxes.append((top, left, top + side, left + side))
        plate_top = top + (side - _PLATE[0]) // 2 + (4 if SHAPES[shape] == "triangle" else 0)
        plate_left = left + (side - _PLATE[1]) // 2
        tens = (plate_top + 1, plate_left + 1, plate_top + 8, plate_left + 6)
        units = (plate_top + 1, plate_left + 7, plate_top + 8, plate_left + 12)
        yield Item(shape, color, number, boxes[-1], (tens, units))


@lru_cache(maxsize=64)
def stencil(shape: int, side: int) -> NDArray[np.float32]:
    """Return the fraction of each pixel that a shape covers, `[side, side]`."""
    fine = 4 * side
    canvas = Image.new("L", (fine, fine), 0)
    pen = ImageDraw.Draw(canvas)
    last, middle = fine - 1, fine / 2
    name = SHAPES[shape]
    if name == "circle":
        pen.ellipse((0, 0, last, last), fill=255)
    elif name == "square":
        inset = fine * 0.08
        pen.rectangle((inset, inset, last - inset, last - inset), fill=255)
    elif name == "triangle":
        pen.polygon([(middle, 0), (last, last), (0, last)], fill=255)
    elif name == "diamond":
        pen.polygon([(middle, 0), (last, middle), (middle, last), (0, middle)], fill=255)
    elif name == "star":
        radii = np.where(np.arange(10) % 2 == 0, middle, middle * 0.45)
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        points = zip(middle + radii * np.cos(angles), middle + radii * np.sin(angles), strict=True)
        pen.polygon([(float(x), float(y)) for x, y in points], fill=255)
    else:
        arm = fine * 0.3
        pen.rectangle((arm, 0, last - arm, last), fill=255)
        pen.rectangle((0, arm, last, last - arm), fill=255)
    coarse = canvas.resize((side, side), Image.Resampling.BOX)
    return np.asarray(coarse, np.float32) / np.float32(255)


def _render(rng: np.random.Generator, items: tuple[Item, ...], paper: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw paper, items, plates and noise, and return the pixels, uint8 `[height, width, 3]`."""
    height, width = size
    sheet = np.empty((height, width, 3), np.float32)
    sheet[:] = rng.uniform(218, 246) + rng.uniform(-8, 8, size=3)
    ink = rng.uniform(45, 75)
    if PAPERS[paper] == "ruled":
        step = int(rng.integers(7, 11))
        sheet[int(rng.integers(step)) :: step] -= ink
    elif PAPERS[paper] == "dotted":
        step = int(rng.integers(6, 9))
        row, column = int(rng.integers(step)), int(rng.integers(step))
        for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            sheet[row + y :: step, column + x :: step] -= ink
    elif PAPERS[paper] == "graded":
        ramp = np.linspace(0.1, 1, height if rng.random() < 0.5 else width, dtype=np.float32)
        ramp = ramp if rng.random() < 0.5 else ramp[::-1]
        sheet -= 1.3 * ink * (ramp[:, None, None] if len(ramp) == height else ramp[None, :, None])
    for item in items:
        top, left, bottom, right = item.box
        alpha = stencil(item.shape, bottom - top)[..., None]
        paint = RGB[item.color] + rng.uniform(-14, 14, size=3)
        sheet[top:bottom, left:right] += alpha * (paint - sheet[top:bottom, left:right])
        (plate_top, plate_left, _, _), _ = item.digits
        sheet[plate_top - 1 : plate_top + 8, plate_left - 1 : plate_left + 12] = 250
        for digit, (digit_top, digit_left, digit_bottom, digit_right) in zip(
            divmod(item.number, 10), item.digits, strict=True
        ):
            sheet[digit_top:digit_bottom, digit_left:digit_right] -= 225 * DIGITS[digit][..., None]
    sheet += rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(2, 8)
    return np.clip(sheet, 0, 255).astype(np.uint8)


def _generate_questions(
    rng: np.random.Generator,
    items: tuple[Item, ...],
    paper: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    places: bool,
    orders: bool,
) -> Iterator[Question]:
    """Yield every question that has a unique answer."""
    height, width = size
    for index, item in enumerate(items):
        shape, color, about = SHAPES[item.shape], COLORS[item.color], (index,)
        for kind, name in (("pair", item.name), ("shape", shape), ("color", f"{color} shape")):
            yield Question(f"What number is on the {name}?", str(item.number), f"number_{kind}", "tiles", about)
        yield Question(f"What color is the {shape}?", color, "color", "either", about)
        yield Question(f"What shape is {color}?", shape, "shape", "either", about)
        y, x = item.center
        # A tile does not contain its position, so only the base tile shows a side that spans several tiles.
        if places and abs(x - width / 2) >= 6:
            answer = "left" if x < width / 2 else "right"
            needs: Needs = "base" if grid[1] > 1 else "either"
            yield Question(f"Is the {item.name} in the left or right half?", answer, "side", needs, about)
        if places and abs(y - height / 2) >= 6:
            answer = "top" if y < height / 2 else "bottom"
            needs = "base" if grid[0] > 1 else "either"
            yield Question(f"Is the {item.name} in the top or bottom half?", answer, "height", needs, about)
    yield Question("How many shapes are there?", str(len(items)), "count", "either", tuple(range(len(items))))
    yield Question("What paper is this?", PAPERS[paper], "paper", "either", ())
    for _ in range(min(len(items) - 1, 2) if orders else 0):
        first, second = (int(value) for value in rng.permutation(len(items))[:2])
        gap = items[second].center[1] - items[first].center[1]
        if abs(gap) >= 10:
            text = f"Is the {items[first].name} left of the {items[second].name}?"
            answer = "yes" if gap > 0 else "no"
            yield Question(text, answer, "order", "base" if grid[1] > 1 else "either", (first, second))
