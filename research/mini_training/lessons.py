"""Ground truth for training: where each thing on a board falls in the tiles that the model sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as images

from research.mini_training.build import PATCH, SIDE
from tokenprune.image import TileGeometry
from tokenprune.models.mini.boards import COLORS, PAPERS, SHAPES, TILE, Board, Question, stencil

__all__ = [
    "DENSE",
    "IGNORE",
    "PLACES",
    "SEVERAL",
    "TOKENS",
    "Lesson",
    "answerable",
    "lesson",
    "packing",
    "random_subset",
    "tiles_of",
]

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]

IGNORE = -100
TOKENS = SIDE * SIDE
"""Tokens of a tile."""
DENSE = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLORS) + 1,
    "tens": 11,
    "units": 11,
    "paper": len(PAPERS),
    "row": SIDE,
    "column": SIDE,
}
"""What every patch has to name, and the number of classes; the last class of the first four means nothing."""
PLACES = {"side": 3, "height": 3}
"""What the patches of items have to name in stage 3, and the number of classes."""
SEVERAL = {"pair": len(SHAPES) * len(COLORS), "tens": 10, "units": 10}
"""What CLS has to name, several at once."""


@dataclass(frozen=True)
class Lesson:
    """The ground truth of one board, base tile first.

    Attributes:
        shown: Whether a patch shows an item, `[items, tiles, tokens]`.
        digits: Whether a patch shows a good part of the tens digit and of the units digit, `[2, items, tiles, tokens]`.
        dense: Class of each patch by head, `[tiles, tokens]`.
        several: What is in a tile by head, 0 or 1, `[tiles, classes]`.
        places: Half of the image that the item of a patch lies in, by head, `[tiles, tokens]`: 0 left or top, 1 right
            or bottom, 2 for items in sub-images, which do not say where they lie.
    """

    shown: Flags
    digits: Flags
    dense: dict[str, Integers]
    several: dict[str, Integers]
    places: dict[str, Integers]


def _overlap(edges: Floats, low: int, high: int) -> Floats:
    """Return how much of each pixel low..high-1 falls between consecutive edges, `[edges - 1, pixels]`."""
    pixel = np.arange(low, high, dtype=np.float32)
    share = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    inside: Floats = np.maximum(share, np.float32(0))
    return inside


def lesson(board: Board) -> Lesson:
    """Return what the patches and the CLS token of each tile of a board show.

    A patch shows an item if the painted shape covers an eighth of it, and a digit if a fifth of the digit lies in it.
    Patches that touch less than that are not asked. The base tile is too coarse for digits and is never asked for them.
    """
    rows, columns = board.grid
    tiles = 1 + rows * columns
    height, width = board.pixels.shape[:2]
    count = len(board.items)
    views = [
        (np.linspace(0, height, SIDE + 1, dtype=np.float32), np.linspace(0, width, SIDE + 1, dtype=np.float32)),
        (
            np.arange(rows * SIDE + 1, dtype=np.float32) * PATCH - board.offset[0],
            np.arange(columns * SIDE + 1, dtype=np.float32) * PATCH - board.offset[1],
        ),
    ]
    covered = np.zeros((3, count, tiles, TOKENS), np.float32)
    for number, item in enumerate(board.items):
        top, left, bottom, right = item.box
        masks = [(item.box, stencil(item.shape, bottom - top))]
        masks += [(box, np.ones((box[2] - box[0], box[3] - box[1]), np.float32)) for box in item.digits]
        for view, (down, across) in enumerate(views):
            area = (down[1] - down[0]) * (across[1] - across[0])
            for kind, ((top, left, bottom, right), mask) in enumerate(masks):
                part = _overlap(down, top, bottom) @ mask @ _overlap(across, left, right).T
                part = part / (mask.sum() if kind else area)
                if view == 0:
                    covered[kind, number, 0] = part.reshape(-1)
                else:
                    cut = part.reshape(rows, SIDE, columns, SIDE).transpose(0, 2, 1, 3)
                    covered[kind, number, 1:] = cut.reshape(tiles - 1, TOKENS)
    shown = covered[0] >= 0.125
    digits = covered[1:] >= 0.2
    digits[:, :, 0] = False
    dense = {name: np.full((tiles, TOKENS), size - 1, dtype=np.int64) for name, size in DENSE.items()}
    touched = (covered[0] > 0.015).any(0)
    for name in ("shape", "colour"):
        dense[name][touched] = IGNORE
    for name, part in (("tens", covered[1]), ("units", covered[2])):
        dense[name][(part > 0.08).any(0)] = IGNORE
        dense[name][0] = IGNORE
    dense["paper"][:] = board.paper
    dense["row"][:], dense["column"][:] = np.divmod(np.arange(TOKENS), SIDE)
    several = {name: np.zeros((tiles, size), dtype=np.int64) for name, size in SEVERAL.items()}
    places = {name: np.full((tiles, TOKENS), IGNORE, dtype=np.int64) for name in PLACES}
    owner = covered[0].argmax(0) if count else np.zeros((tiles, TOKENS), np.int64)
    for number, item in enumerate(board.items):
        mine = shown[number] & (owner == number)
        dense["shape"][mine], dense["colour"][mine] = item.shape, item.color
        for name, center, extent in (("side", item.center[1], width), ("height", item.center[0], height)):
            places[name][mine] = 2
            places[name][0][mine[0]] = IGNORE if abs(center - extent / 2) < 6 else int(center > extent / 2)
        present = shown[number].any(-1)
        several["pair"][present, item.shape * len(COLORS) + item.color] = 1
        for name, value, where in zip(("tens", "units"), divmod(item.number, 10), digits[:, number], strict=True):
            dense[name][where] = value
            several[name][where.any(-1), value] = 1
    return Lesson(shown, digits, dense, several, places)


def tiles_of(boards: Sequence[Board]) -> tuple[Tensor, list[int]]:
    """Return what the processor makes of the boards, without its overhead.

    Args:
        boards: The boards.

    Returns:
        All tiles `[tiles, 3, height, width]`, base tile of each board first, and the number of tiles of each board.
    """
    tiles, numbers = [], []
    for board in boards:
        rows, columns = board.grid
        image = torch.from_numpy(board.pixels).permute(2, 0, 1)
        base = images.resize(image, [TILE, TILE], InterpolationMode.BICUBIC, antialias=True)
        canvas = torch.zeros(3, rows * TILE, columns * TILE, dtype=torch.uint8)
        top, left = board.offset
        canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
        cut = canvas.reshape(3, rows, TILE, columns, TILE).permute(1, 3, 0, 2, 4).reshape(-1, 3, TILE, TILE)
        tiles += [base[None], cut]
        numbers.append(1 + rows * columns)
    return torch.cat(tiles).float() / 127.5 - 1, numbers


def packing(board: Board) -> tuple[Integers, Integers]:
    """Return the order in which LLaVA-NeXT packs the tokens of a board.

    Args:
        board: The board.

    Returns:
        The flat tile token at each visual position, -1 for a newline, `[visual]`; and the row of the mosaic that it
        belongs to, -1 in the base tile, `[visual]`.
    """
    height, width = board.pixels.shape[:2]
    layout = TileGeometry.anyres((height, width), board.grid, (SIDE, SIDE), TILE)
    return layout.packed.numpy(), layout.newline_of.numpy()


def random_subset(rng: np.random.Generator, truth: Lesson) -> Flags:
    """Draw which visual tokens of an image are there.

    Chance and the board's own geometry decide; no strategy, no attention and no score is asked.

    Args:
        rng: The source of chance.
        truth: The ground truth of the board.

    Returns:
        The kept tokens, bool `[tiles, tokens]`.
    """
    tiles = truth.dense["paper"].shape[0]
    kind = rng.choice(4, p=[0.2, 0.2, 0.2, 0.4])
    noise = rng.random((tiles, TOKENS))
    if kind == 0:  # single tokens, one rate
        kept = noise < rng.uniform(0.05, 1)
    elif kind == 1:  # single tokens, a rate for each tile
        kept = noise < rng.uniform(0, 1, (tiles, 1)) ** 1.5
    elif kind == 2:  # blocks
        block = int(rng.choice([2, 5]))
        coarse = rng.random((tiles, SIDE // block, SIDE // block)) < rng.uniform(0.1, 0.9)
        inside = coarse.repeat(block, 1).repeat(block, 2).reshape(tiles, TOKENS)
        kept = noise < np.where(inside, rng.uniform(0.6, 1), rng.uniform(0, 0.2))
    else:  # objects and background at rates of their own
        thing = truth.shown.any(0)
        kept = noise < np.where(thing, rng.uniform(0.3, 1), rng.uniform(0, 1) ** 2 * 0.5)
    if rng.random() < 0.15:
        kept[rng.integers(tiles)] = False
    if not kept.any():
        kept[0] = True
    return kept


def answerable(question: Question, truth: Lesson, kept: Flags) -> bool:
    """Whether the kept tokens still show what a question asks for.

    A number needs a token of each of its digits, a place needs a token of the item in the base tile, everything else a
    token of each item in the base tile or two in the tiles.

    Args:
        question: The question.
        truth: The ground truth of the board.
        kept: The kept tokens, bool `[tiles, tokens]`.
    """
    for item in question.about:
        shown = truth.shown[item] & kept
        in_base, in_tiles = int(shown[0].sum()), int(shown[1:].sum())
        if question.needs == "tiles":
            seen = bool((truth.digits[:, item] & kept).any((-2, -1)).all())
        elif question.type in PLACES:
            seen = in_base >= 1
        else:
            seen = in_base + in_tiles / 2 >= 1
        if not seen:
            return False
    return True
