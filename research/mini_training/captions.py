"""Captions of tiles: sentences about the content of a tile, and the tiles that match them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.models.mini.boards import COLORS, PAPERS, SHAPES

ANY, NOTHING, ILLEGIBLE = -1, -2, -3
"""`ANY` (captions): every value matches. `NOTHING` (tiles): no value. `ILLEGIBLE` (tiles): the value is too coarse to
read."""
Integers = NDArray[np.int64]
_ABOUT_ITEM = (
    *(("what number is on the {color} {shape}?", "sc"), ("what number is on the {shape}?", "s")),
    *(("what number is on the {color} shape?", "c"), ("what color is the {shape}?", "s")),
    *(("what shape is {color}?", "c"), ("is the {color} {shape} in the left or right half?", "sc")),
    *(("is the {color} {shape} in the top or bottom half?", "sc"), ("how many shapes are there?", "")),
    *(("{color} {shape}", "sc"), ("the {shape} is {color}", "sc"), ("this is the {color} {shape}", "sc")),
    *(("the {shape}", "s"), ("there is the {shape}", "s"), ("the {color} shape", "c"), ("it is {color}", "c")),
)
_ABOUT_NUMBER = (
    *(("number {number}", "n"), ("number {number} on the {color} {shape}", "scn")),
    *(("the number on the {shape} is {number}", "sn"), ("{number} is on the {color} shape", "cn")),
)
_ABOUT_PAPER = (("{paper} paper", "p"), ("the paper is {paper}", "p"), ("what paper is this?", ""))
UNKNOWN = "please "
"""A word that is not in the vocabulary. Users can write unknown words, and a few of them before a sentence must not
change the result."""


@dataclass(frozen=True)
class Caption:
    """A sentence, and the classes that a tile must show to match it.

    Attributes:
        text: The sentence.
        required: Class of item, shape, color, tens, units and paper; `ANY` if the sentence does not depend on it.
    """

    text: str
    required: tuple[int, int, int, int, int, int]


def draw_caption(rng: np.random.Generator, contents: Integers) -> Caption:
    """Draw a random sentence about a tile.

    Args:
        rng: The random generator.
        contents: Content of the tile, `[1 + items, 6]`, see `train_text.Cache`.

    Returns:
        The sentence. For a tile without items it describes the paper, and for the base tile it never contains a number.
    """
    items = contents[contents[:, 0] == 1]
    row = items[rng.integers(len(items))] if len(items) and rng.random() < 0.9 else contents[0]
    templates: tuple[tuple[str, str], ...] = _ABOUT_ITEM if row[0] else _ABOUT_PAPER
    if row[3] >= 0 and rng.random() < 0.25:
        templates = _ABOUT_NUMBER
    template, attributes = templates[rng.integers(len(templates))]
    is_item, shape, color, tens, units, paper = (int(value) for value in row)
    text = template.format(shape=SHAPES[shape], color=COLORS[color], number=10 * tens + units, paper=PAPERS[paper])
    if rng.random() < 0.2:
        text = UNKNOWN * int(rng.integers(1, 5)) + text
    required = (
        is_item if is_item else ANY,
        shape if "s" in attributes else ANY,
        color if "c" in attributes else ANY,
        tens if "n" in attributes else ANY,
        units if "n" in attributes else ANY,
        paper if "p" in attributes else ANY,
    )
    return Caption(text, required)


def match_captions(captions: Sequence[Caption], contents: Integers) -> tuple[Tensor, Tensor]:
    """Return which tiles match which sentences.

    Args:
        captions: The sentences.
        contents: Content of the tiles, `[tiles, 1 + items, 6]`, see `train_text.Cache`.

    Returns:
        Whether a tile matches a sentence, and whether this is determined, both bool `[captions, tiles]`. It is not
        determined for a number and a base tile, which is too coarse to show numbers.
    """
    required = np.array([caption.required for caption in captions])[:, None, None]
    tiles = contents[None]
    fits = (required == ANY) | (required == tiles)
    certain = fits.all(-1).any(-1)
    possible = (fits | (tiles == ILLEGIBLE)).all(-1).any(-1)
    return torch.from_numpy(certain), torch.from_numpy(certain | ~possible)
