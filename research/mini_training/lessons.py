"""Ground truth for training: the tiles and patches that show each item of a board."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as images

from research.mini_training.build import PATCH, SIDE
from tokenprune.geometry import TileGeometry
from tokenprune.models.mini.boards import COLORS, PAPERS, SHAPES, TILE, Board, Question, stencil
from tokenprune.models.mini.pages import Page

__all__ = [
    "DENSE",
    "IGNORE",
    "PLACES",
    "PRESENCE",
    "TOKENS",
    "Lesson",
    "draw_subset",
    "is_answerable",
    "make_lesson",
    "make_tiles",
    "pack_positions",
]

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]

IGNORE = -100
TOKENS = SIDE * SIDE
"""Number of tokens of a tile."""
DENSE = {
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 1,
    "tens": 11,
    "units": 11,
    "paper": len(PAPERS),
    "row": SIDE,
    "column": SIDE,
}
"""Number of classes of each head on patches; the last class of the first four heads means that nothing is shown."""
PLACES = {"side": 3, "height": 3}
"""Number of classes of the heads on patches of items that are trained at the end of stage 2."""
PRESENCE = {"pair": len(SHAPES) * len(COLORS), "tens": 10, "units": 10}
"""Number of classes of the multi-label heads on the CLS token."""


@dataclass(frozen=True)
class Lesson:
    """The ground truth of one board, base tile first.

    Attributes:
        item_masks: Whether a patch shows an item, bool `[items, tiles, tokens]`.
        digit_masks: Whether a patch shows a large part of the tens digit and of the units digit, bool
            `[2, items, tiles, tokens]`.
        dense: Class of each patch, by head, `[tiles, tokens]`.
        presence: Whether a class is present in a tile (0 or 1), by head, `[tiles, classes]`.
        places: Half of the image with the item of a patch, by head, `[tiles, tokens]`: 0 for left or top, 1 for right
            or bottom. 2 for items in sub-images, because a sub-image does not show its position.
    """

    item_masks: Flags
    digit_masks: Flags
    dense: dict[str, Integers]
    presence: dict[str, Integers]
    places: dict[str, Integers]


def _overlap(edges: Floats, low: int, high: int) -> Floats:
    """Return the share of each pixel low..high-1 between consecutive edges, `[edges - 1, pixels]`."""
    pixel = np.arange(low, high, dtype=np.float32)
    share = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.maximum(share, np.float32(0))


def make_lesson(board: Board) -> Lesson:
    """Return the ground truth of the patches and the CLS token of each tile of a board.

    A patch shows an item if the painted shape covers an eighth of the patch. It shows a digit if a fifth of the digit
    is in the patch. Patches with a smaller overlap are ignored. The base tile is too coarse for digits, so its digits
    are ignored.
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
        for view, (ys, xs) in enumerate(views):
            area = (ys[1] - ys[0]) * (xs[1] - xs[0])
            for kind, ((top, left, bottom, right), mask) in enumerate(masks):
                part = _overlap(ys, top, bottom) @ mask @ _overlap(xs, left, right).T
                part = part / (mask.sum() if kind else area)
                if view == 0:
                    covered[kind, number, 0] = part.reshape(-1)
                else:
                    sub_images = part.reshape(rows, SIDE, columns, SIDE).transpose(0, 2, 1, 3)
                    covered[kind, number, 1:] = sub_images.reshape(tiles - 1, TOKENS)
    item_masks = covered[0] >= 0.125
    digit_masks = covered[1:] >= 0.2
    digit_masks[:, :, 0] = False
    dense = {name: np.full((tiles, TOKENS), size - 1, dtype=np.int64) for name, size in DENSE.items()}
    touched = (covered[0] > 0.015).any(0)
    for name in ("shape", "color"):
        dense[name][touched] = IGNORE
    for name, part in (("tens", covered[1]), ("units", covered[2])):
        dense[name][(part > 0.08).any(0)] = IGNORE
        dense[name][0] = IGNORE
    dense["paper"][:] = board.paper
    dense["row"][:], dense["column"][:] = np.divmod(np.arange(TOKENS), SIDE)
    presence = {name: np.zeros((tiles, size), dtype=np.int64) for name, size in PRESENCE.items()}
    places = {name: np.full((tiles, TOKENS), IGNORE, dtype=np.int64) for name in PLACES}
    owner = covered[0].argmax(0) if count else np.zeros((tiles, TOKENS), np.int64)
    for number, item in enumerate(board.items):
        owned = item_masks[number] & (owner == number)
        dense["shape"][owned], dense["color"][owned] = item.shape, item.color
        for name, center, extent in (("side", item.center[1], width), ("height", item.center[0], height)):
            places[name][owned] = 2
            places[name][0][owned[0]] = IGNORE if abs(center - extent / 2) < 6 else int(center > extent / 2)
        visible = item_masks[number].any(-1)
        presence["pair"][visible, item.shape * len(COLORS) + item.color] = 1
        for name, value, mask in zip(("tens", "units"), divmod(item.number, 10), digit_masks[:, number], strict=True):
            dense[name][mask] = value
            presence[name][mask.any(-1), value] = 1
    return Lesson(item_masks, digit_masks, dense, presence, places)


def make_tiles(boards: Sequence[Board | Page]) -> tuple[Tensor, list[int]]:
    """Return the tiles of boards or pages as the processor does, without its overhead.

    Args:
        boards: The boards or pages.

    Returns:
        All tiles `[tiles, 3, height, width]`, base tile of each image first, and the number of tiles of each image.
    """
    tiles, numbers = [], []
    for board in boards:
        rows, columns = board.grid
        image = torch.from_numpy(board.pixels).permute(2, 0, 1)
        base = images.resize(image, [TILE, TILE], InterpolationMode.BICUBIC, antialias=True)
        canvas = torch.zeros(3, rows * TILE, columns * TILE, dtype=torch.uint8)
        top, left = board.offset
        canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
        sub_images = canvas.reshape(3, rows, TILE, columns, TILE).permute(1, 3, 0, 2, 4).reshape(-1, 3, TILE, TILE)
        tiles += [base[None], sub_images]
        numbers.append(1 + rows * columns)
    return torch.cat(tiles).float() / 127.5 - 1, numbers


def pack_positions(board: Board | Page) -> tuple[Integers, Integers]:
    """Return the order in which LLaVA-NeXT packs the tokens of a board or a page.

    Args:
        board: The board or page.

    Returns:
        The flat index of the tile token at each visual position, -1 for a newline token, `[visual]`; and the row of
        this position in the grid of sub-images, -1 in the base tile, `[visual]`.
    """
    height, width = board.pixels.shape[:2]
    layout = TileGeometry.anyres((height, width), board.grid, (SIDE, SIDE), TILE)
    return layout.packed.numpy(), layout.newline_index.numpy()


def draw_subset(rng: np.random.Generator, shows_item: Flags) -> Flags:
    """Draw a random subset of the visual tokens of an image.

    The subset depends only on the random generator and the geometry of the image, not on a strategy, attention or a
    score.

    Args:
        rng: The random generator.
        shows_item: Whether a patch shows an item, bool `[tiles, tokens]`.

    Returns:
        The kept tokens, bool `[tiles, tokens]`.
    """
    tiles = len(shows_item)
    kind = rng.choice(4, p=[0.2, 0.2, 0.2, 0.4])
    noise = rng.random((tiles, TOKENS))
    if kind == 0:  # single tokens with one rate
        kept = noise < rng.uniform(0.05, 1)
    elif kind == 1:  # single tokens with one rate per tile
        kept = noise < rng.uniform(0, 1, (tiles, 1)) ** 1.5
    elif kind == 2:  # blocks
        block = int(rng.choice([2, 5]))
        coarse = rng.random((tiles, SIDE // block, SIDE // block)) < rng.uniform(0.1, 0.9)
        in_block = coarse.repeat(block, 1).repeat(block, 2).reshape(tiles, TOKENS)
        kept = noise < np.where(in_block, rng.uniform(0.6, 1), rng.uniform(0, 0.2))
    else:  # items and background with separate rates
        kept = noise < np.where(shows_item, rng.uniform(0.3, 1), rng.uniform(0, 1) ** 2 * 0.5)
    if rng.random() < 0.15:
        kept[rng.integers(tiles)] = False
    if not kept.any():
        kept[0] = True
    return kept


def is_answerable(question: Question, truth: Lesson, kept: Flags) -> bool:
    """Return whether the kept tokens still show the answer of a question.

    A number requires a token of each of its digits. A place requires a token of the item in the base tile. Every other
    answer requires, for each item, one token in the base tile or two tokens in the sub-images.

    Args:
        question: The question.
        truth: The ground truth of the board.
        kept: The kept tokens, bool `[tiles, tokens]`.
    """
    for item in question.about:
        kept_of_item = truth.item_masks[item] & kept
        in_base, in_tiles = int(kept_of_item[0].sum()), int(kept_of_item[1:].sum())
        if question.needs == "tiles":
            is_visible = bool((truth.digit_masks[:, item] & kept).any((-2, -1)).all())
        elif question.type in PLACES:
            is_visible = in_base >= 1
        else:
            is_visible = in_base + in_tiles / 2 >= 1
        if not is_visible:
            return False
    return True
