"""Emulators: functions that change the encoding of a board as released code does outside the strategy.

Some releases read further images of a batch, put tokens at wrong positions, feed zero vectors, or replace the
processor's tile grid. `research.emulated` measures the answers of the LLM with them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from research.heldout import make_text_guided
from tokenprune.adapter import Encoding, PackedTokens, find_adapter
from tokenprune.budget import as_budget
from tokenprune.capabilities import ProjectsMixtures, ReadsQuestion, require_capability
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.image import TEXT_SIGNALS, EncodedImage, Signal
from tokenprune.models.mini.boards import TILE, Board, make_board
from tokenprune.reducer import TokenReducer
from tokenprune.selection import Selection
from tokenprune.stages import gather_mixing_sources, mix
from tokenprune.strategies import TRIM, GlobalCom2, HiRED, HoloV, PruMerge, UniformStride, VisPruner
from tokenprune.strategies.trim import OutlierAllocation, outlier_share

BATCH = 8
"""Number of images in a batch."""
Grid: TypeAlias = tuple[int, int]


class LlmInput(NamedTuple):
    """Visual input of the LLM: the encoded images of a prompt, and a strategy for them.

    Args:
        encoding: the images of one prompt; the questions refer to the last image.
        reducer: the strategy.
        tokens: keys of the kept tokens of the last image; a key contains the tile grid, the position and the row.
    """

    encoding: Encoding
    reducer: TokenReducer
    tokens: frozenset[Hashable]


@dataclass(frozen=True, eq=False)
class EncodedBoard:
    """An encoded board, as the last image of a batch.

    Args:
        model: the model.
        processor: the processor of the model.
        board: the board.
        encoding: encoding of the board.
        earlier: encodings of the preceding boards of the batch, in order.
    """

    model: Any
    processor: Any
    board: Board
    encoding: Encoding
    earlier: Sequence[Encoding]

    def with_question(self, image: EncodedImage) -> EncodedImage:
        """Return an image with the text signals of the first question of the board."""
        question = require_capability(find_adapter(self.model), ReadsQuestion).embed_question(
            self.board.questions[0].text, "mini"
        )
        text = {(kind, image.feature_layer): question[kind] for kind in TEXT_SIGNALS}
        return replace(image, signals={**image.signals, **text})

    def reduce(self, encoding: Encoding, reducer: TokenReducer) -> LlmInput:
        """Return the input of the LLM for an encoding and a strategy.

        If the strategy reads a question, the keys of the kept tokens refer to the first question of the board.
        """
        image = encoding.images[-1]
        kept = reducer.reduce(self.with_question(image)).kept.flatten()
        layout = image.geometry
        rows = torch.cumsum(layout.packed == NEWLINE, dim=0).tolist()
        positions = zip(layout.packed.tolist(), rows, strict=True)
        grid = {position: layout.tile_grid if position >= layout.tokens else None for position in range(len(kept))}
        return LlmInput(
            encoding, reducer, frozenset((grid[p], p, r) for p, r in positions if p != NEWLINE and bool(kept[p]))
        )


Emulator: TypeAlias = Callable[[EncodedBoard, float], LlmInput]
"""Function from a board and a budget to the visual input of the LLM."""


def apply_strategy(make: Callable[[float], TokenReducer]) -> Emulator:
    """Return the emulator of an unmodified strategy.

    Args:
        make: returns the strategy for a budget.
    """
    return lambda encoded, budget: encoded.reduce(encoded.encoding, make(budget))


def repack(make: Callable[[float], TokenReducer], layout: Callable[[TileGeometry, Grid], Tensor]) -> Emulator:
    """Return the emulator of a strategy with a different packing of the tokens.

    Args:
        make: returns the strategy for a budget; tokens that the packing removes are invalid for the strategy.
        layout: returns `TileGeometry.packed` from the true layout and the height x width of the image in pixels.
    """

    def emulator(encoded: EncodedBoard, budget: float) -> LlmInput:
        image = encoded.encoding.images[0]
        size = (encoded.board.pixels.shape[0], encoded.board.pixels.shape[1])
        packed = layout(image.geometry, size)
        assert image.newline is not None
        table = torch.cat([image.features.flatten(0, 1), image.newline[None]])
        image = replace(image, geometry=replace(image.geometry, packed=packed))
        tokens = PackedTokens([table[packed]])
        return encoded.reduce(replace(encoded.encoding, images=[image], is_complete=False, tokens=tokens), make(budget))

    return emulator


def pack_with_swapped_grid(layout: TileGeometry, size: Grid, tile_size: int = TILE) -> Tensor:
    """Return the packing of HiRED's fork of LLaVA-NeXT, `[length]`: tile grid rows and columns swapped, then unpadded.

    Args:
        layout: the true layout.
        size: height x width of the image in pixels.
        tile_size: side of a tile in pixels.
    """
    rows, cols = layout.tile_grid
    return TileGeometry.anyres(size, (cols, rows), layout.token_grid, tile_size).packed


def pack_at_valid_index(layout: TileGeometry, size: Grid) -> Tensor:
    """Return the packing of GlobalCom2, `[length]`, which moves each valid token to its index among the valid tokens.

    The index counts the valid tokens of a tile. Newline tokens of padding rows stay.

    Args:
        layout: the true layout.
        size: not used; the true layout contains the size.
    """
    empty = NEWLINE - 1
    tiles = torch.full((layout.sub_images, layout.tokens), empty)
    for tile, valid in enumerate(layout.valid[1:]):
        positions = valid.nonzero()[:, 0]
        tiles[tile, : len(positions)] = (1 + tile) * layout.tokens + positions
    (rows, cols), (height, width) = layout.tile_grid, layout.token_grid
    to_canvas = "(rows cols) (height width) -> (rows height) (cols width)"
    canvas = rearrange(tiles, to_canvas, rows=rows, cols=cols, height=height, width=width)
    canvas = torch.cat([canvas, torch.full((len(canvas), 1), NEWLINE)], dim=1).flatten()
    return torch.cat([torch.arange(layout.tokens), canvas[canvas != empty]])


def fill_with_zeros(encoded: EncodedBoard, budget: float) -> LlmInput:
    """Return the LLM input of HoloV's release, with zero vectors at the end for tokens that its stripes cannot hold."""
    reducer, image = HoloV.release(budget), encoded.encoding.images[0]
    selection = reducer.reduce(image)
    assert selection.order is not None
    features = encoded.encoding.packed[0][selection.packed_mask()][selection.order]
    missing = selection.asked - selection.kept_tokens
    tokens = encoded.reduce(encoded.encoding, reducer).tokens | {("zero", number) for number in range(missing)}
    features = torch.cat([features, features.new_zeros(missing, features.shape[1])])
    return LlmInput(*wrap_features(encoded.encoding, features), tokens)


def wrap_features(encoding: Encoding, features: Tensor) -> tuple[Encoding, TokenReducer]:
    """Return an encoding with given features, `[length, dim]`, and a strategy that keeps all of them."""
    image = EncodedImage(TileGeometry.single((1, len(features))), features[None])
    return replace(encoding, images=[image], is_complete=False, tokens=PackedTokens([features])), UniformStride(1.0)


def merge_images(images: Sequence[EncodedImage]) -> EncodedImage:
    """Return one image with the tiles of several images, without newline tokens.

    Args:
        images: encoded images of one model.
    """
    layouts = [image.geometry for image in images]
    starts = np.cumsum([0, *(layout.tiles * layout.tokens for layout in layouts)])
    packed = [p[p != NEWLINE] + int(s) for p, s in zip([layout.packed for layout in layouts], starts, strict=False)]
    tiles = sum(layout.tiles for layout in layouts)
    geometry = TileGeometry((tiles - 1, 1), layouts[0].token_grid, torch.zeros(tiles - 1, 4), torch.cat(packed))
    signals = {key: torch.cat([image.signals[key] for image in images]) for key in images[0].signals}
    features = torch.cat([image.features for image in images])
    return replace(images[0].with_features(features), geometry=geometry, signals=signals)


def prune_by_batch_outliers(encoded: EncodedBoard, budget: float) -> LlmInput:
    """Return the LLM input of PruMerge's release for the last image of a batch; all images count for the outliers."""
    images = [encoding.images[0] for encoding in (*encoded.earlier[1 - BATCH :], encoded.encoding)]
    batch, layout = merge_images(images), images[-1].geometry
    selection: Selection = PruMerge.release().reduce(batch)
    first = batch.geometry.tiles - layout.tiles
    assert selection.mixing is not None
    assert selection.order is not None
    mixed = mix(selection.mixing, gather_mixing_sources(batch, selection))[selection.order]
    features = require_capability(find_adapter(encoded.model), ProjectsMixtures).project(
        mixed[int(selection.kept[:first].sum()) :]
    )
    kept = selection.kept[first:].flatten()
    all_tokens = encoded.reduce(encoded.encoding, UniformStride(1.0)).tokens
    tokens = frozenset(token for token in all_tokens if bool(kept[token[1]]))  # type: ignore[index]
    return LlmInput(*wrap_features(encoded.encoding, features), tokens)


@dataclass
class BatchOutlierAllocation(OutlierAllocation):
    """TRIM's adaptive share of tokens, with outliers counted over a batch of images.

    Args:
        batch_scores: scores of the remaining images of the batch after softmax, in one list.
    """

    batch_scores: list[float] = field(default_factory=list)

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Return the number of outliers per tile."""
        share = outlier_share(torch.cat([scores.softmax(dim=1).flatten(), scores.new_tensor(self.batch_scores)]))
        return [min(int(scores.shape[1] * share) + self.extra, limit) for limit in capacity]


def adaptive_trim(allocation: OutlierAllocation) -> TRIM:
    """Return the repaired TRIM with a share of tokens that is computed from outliers."""
    return replace(make_text_guided()[2], budget=1.0, allocation=allocation)


def prune_by_batch_relevance(encoded: EncodedBoard, budget: float) -> LlmInput:
    """Return the LLM input of TRIM's adaptive share for the last image of a batch, with one question for all images."""
    score, batch_scores = adaptive_trim(OutlierAllocation()).selection.score, []
    for encoding in encoded.earlier[1 - BATCH :]:
        scores = score(encoded.with_question(encoding.images[0]))
        scores = scores.masked_fill(~encoding.images[0].geometry.valid, -torch.inf)
        batch_scores += scores.softmax(dim=1).flatten().tolist()
    return encoded.reduce(encoded.encoding, adaptive_trim(BatchOutlierAllocation(batch_scores=batch_scores)))


def keep_base_tile(encoding: Encoding) -> Encoding:
    """Return an encoding with only the base tile of the image, as in LLaVA-1.5."""
    image = encoding.images[0]
    layout = TileGeometry.single(image.geometry.token_grid)
    signals = {key: value[:1] for key, value in image.signals.items()}
    image = replace(image.with_features(image.features[:1]), geometry=layout, signals=signals)
    return replace(encoding, images=[image], is_complete=False, tokens=PackedTokens([image.features[0]]))


def share_attention(first: EncodedImage, second: EncodedImage) -> EncodedImage:
    """Return the second image with the attention of the first image, as in HiRED on LLaVA-1.5."""
    return replace(second, signals=first.signals)


def shift_attention(first: EncodedImage, second: EncodedImage) -> EncodedImage:
    """Return the second image with the attention that GlobalCom2 reads for it, which is shifted by tiles.

    The base tile of the second image gets the attention of the first sub-image of the first image, the next tile gets
    the attention of the next tile, and so on through the tiles of both images.
    """
    tiles = second.geometry.tiles
    both = {key: torch.cat([first.signals[key], value])[1 : 1 + tiles] for key, value in second.signals.items()}
    return replace(second, signals=both)


def use_second_image(
    make: Callable[[float], TokenReducer],
    read: Callable[[EncodedImage, EncodedImage], EncodedImage] = lambda first, second: second,
    separate_prompts: bool = False,
    preprocess: Callable[[Encoding], Encoding] = lambda encoding: encoding,
) -> Emulator:
    """Return the emulator of a strategy on the second of two images.

    Args:
        make: returns the strategy for a budget.
        read: returns the second image as the released code reads it, from the first and the second image.
        separate_prompts: whether the two images are in separate prompts of a batch, or in one prompt.
        preprocess: returns the part of an encoding that the model encodes.
    """

    def emulator(encoded: EncodedBoard, budget: float) -> LlmInput:
        first, second = preprocess(encoded.earlier[-1]), preprocess(encoded.encoding)
        image = read(first.images[0], second.images[0])
        if separate_prompts:
            return encoded.reduce(replace(second, images=[image]), make(budget))
        tokens = PackedTokens([first.packed[0], second.packed[0]])
        both = Encoding([first.images[0], image], tokens, second.outputs)
        return encoded.reduce(both, make(budget))

    return emulator


def change_grid(
    make: Callable[[float | int], TokenReducer], choose: Callable[[Grid], Grid], keeps_count: bool = True
) -> Emulator:
    """Return the emulator of a strategy with a different tile grid.

    Args:
        make: returns the strategy for a budget.
        choose: returns rows x cols of the sub-images from height x width of the image in pixels.
        keeps_count: whether the number of kept tokens is the same as with the grid of the model, or the share.
    """

    def emulator(encoded: EncodedBoard, budget: float) -> LlmInput:
        size = (encoded.board.pixels.shape[0], encoded.board.pixels.shape[1])
        encoding = encode_board(encoded.model, encoded.processor, encoded.board, choose(size))
        asked = as_budget(budget).asked(encoded.encoding.images[0].geometry)
        return encoded.reduce(encoding, make(asked if keeps_count else budget))

    return emulator


def two_by_two_grid(size: Grid) -> Grid:
    """Return the tile grid that VisPruner and CDPruner use for every image."""
    return 2, 2


def grid_by_used_share(size: Grid, grids: Sequence[Grid] = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))) -> Grid:
    """Return the tile grid of FasterVLM: the first grid whose canvas has the largest share of image pixels.

    Args:
        size: height x width of the image in pixels.
        grids: candidates as rows x cols.
    """

    def share(grid: Grid) -> float:
        height, width = grid[0] * TILE, grid[1] * TILE
        scale = min(width / size[1], height / size[0])
        return int(size[1] * scale) * int(size[0] * scale) / (height * width)

    return max(grids, key=share)


def all_boards(first: int) -> Iterator[Board]:
    """Return an iterator over held-out boards."""
    return (make_board(index, "heldout") for index in count(first))


def boards_with_side_padding(first: int) -> Iterator[Board]:
    """Return an iterator over held-out boards that AnyRes pads left and right."""
    return (board for board in all_boards(first) if board.offset[1])


def boards_with_changed_grid(first: int) -> Iterator[Board]:
    """Return an iterator over held-out boards for which the tile grids of FasterVLM and LLaVA-NeXT differ."""
    return (b for b in all_boards(first) if grid_by_used_share((b.pixels.shape[0], b.pixels.shape[1])) != b.grid)


def encode_board(model: Any, processor: Any, board: Board, grid: Grid | None = None) -> Encoding:
    """Encode a board with every signal that the emulated methods read.

    Args:
        model: the model.
        processor: the processor of the model.
        board: the board.
        grid: rows x cols of the sub-images; by default, the model selects the grid.
    """
    readers = (HiRED(), GlobalCom2(), HoloV(), PruMerge.release(), VisPruner(), *make_text_guided())
    needs: list[Signal] = [signal for reducer in readers for signal in reducer.needs]
    config = model.config
    original = config.image_grid_pinpoints
    config.image_grid_pinpoints = original if grid is None else [[grid[0] * TILE, grid[1] * TILE]]
    try:
        inputs = processor.image_processor(
            [board.image], image_grid_pinpoints=config.image_grid_pinpoints, return_tensors="pt"
        )
        with torch.no_grad():
            return find_adapter(model).encode(inputs, needs, text_model="mini")
    finally:
        config.image_grid_pinpoints = original
