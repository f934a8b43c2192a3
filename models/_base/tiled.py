"""Base class of adapters whose images are tiles of one size: groups the tiles of a call and finds their grids.

Processors of these families return tiles and a prompt, but no grid. The text between the placeholders determines which
tiles belong to one image. The grid of an image is the arrangement of its sub-images that, if shrunk, differs least from
the base tile.

The unmodified models accept any prompt with as many placeholders as the tiles have tokens. If the prompt does not come
from the processor, each tile that its text does not group counts as one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenprune.capabilities import HasDecoder
from tokenprune.geometry import TileGeometry
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._base.vision_inputs import compute_once, read_once

THUMBNAIL_SIDE = 32
"""Side in pixels to which tiles and base tile are shrunk for comparison."""

VOCABULARY_CHUNK = 4096
"""Number of rows of the embedding matrix that are hashed at a time."""

KEY_COLUMNS = 64
"""Number of columns of an embedding that its hash covers."""


class TiledAdapter(PlaceholderAdapter, HasDecoder):
    """A family whose images are a base tile and sub-images of one size, cut evenly from the image."""

    grouped_by: ClassVar[Literal["opening", "closing"]] = "opening"
    """Meaning of the id before a span of placeholders: the id before the first span of a prompt row opens each image
    (``"opening"``), or the id before the last span of a row closes each image (``"closing"``)."""
    features_by_tile: ClassVar[bool] = True
    base_first: ClassVar[bool] = False

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image, from the prompt and the pixels.

        Raises:
            ValueError: if a vision input is missing, or the placeholders do not fit the tiles.
        """
        self.check_inputs(inputs)
        parts = self.all_tiles(inputs).split(self.tiles_per_image(inputs))
        grids = self.grids(inputs, parts)
        wrong = [n for n, (rows, cols) in enumerate(grids) if len(parts[n]) != 1 + rows * cols]
        for number, grid in zip(wrong, self.find_grids([parts[number] for number in wrong]), strict=True):
            grids[number] = grid
        return [self.layout(tiles, grid) for tiles, grid in zip(parts, grids, strict=True)]

    def layout(self, tiles: Tensor, grid: tuple[int, int]) -> TileGeometry:
        """Return the layout of one image.

        Args:
            tiles: its tiles in the model's order, `[tiles, 3, height, width]`.
            grid: rows x cols of its sub-images.
        """
        return TileGeometry.tiled(grid, self.token_grid, self.base_first)

    def grids(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return rows x cols of the sub-images of each image, from the pixels if the prompt does not contain them.

        Args:
            inputs: the model inputs of the call.
            parts: the tiles of each image in the model's order, `[tiles, 3, height, width]` each.
        """
        key = ("grids", self.base_first, *(len(tiles) for tiles in parts))
        return list(compute_once(inputs[self.pixels], key, partial(self.find_grids, parts)))

    def find_grids(self, parts: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return rows x cols of the sub-images of each image, from its pixels.

        Args:
            parts: the tiles of each image in the model's order, `[tiles, 3, height, width]` each.
        """
        if self.base_first:
            return find_grids([tiles[1:] for tiles in parts], [tiles[0] for tiles in parts])
        return find_grids([tiles[:-1] for tiles in parts], [tiles[-1] for tiles in parts])

    def ids_after(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[list[int]]:
        """Return the token id after each tile of each image; the placeholder id if the next tile follows directly."""
        ids = F.pad(self.prompt_ids(inputs), (0, 1), value=-1)
        spans = tile_spans(placeholder_spans(ids == self.image_token_id), self.tokens_per_tile)
        after = [int(ids[span.row, span.start + span.length]) for span in spans or ()]
        ends = torch.tensor([len(tiles) for tiles in parts], dtype=torch.long).cumsum(0).tolist()
        return [after[end - len(tiles) : end] for tiles, end in zip(parts, ends, strict=True)]

    @property
    def tokens_per_tile(self) -> int:
        """Number of visual tokens of one tile."""
        return self.token_grid[0] * self.token_grid[1]

    def all_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tiles that the tower encodes, `[tiles, 3, height, width]`."""
        return inputs[self.pixels]

    def tiles_per_image(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the number of tiles of each image, in the order of the prompt.

        Raises:
            ValueError: if the placeholders do not fit the tiles.
        """
        ids, tiles = self.prompt_ids(inputs), len(self.all_tiles(inputs))
        spans = self.tile_spans(ids, tiles)
        return [1] * tiles if spans is None else split_pairs(group_tiles(spans, ids, self.grouped_by))

    def tile_spans(self, ids: Tensor, tiles: int) -> list[Span] | None:
        """Return the placeholder span of each tile, in the order of the prompts; None if text interrupts a tile.

        Args:
            ids: the prompts, `[rows, length]`.
            tiles: number of tiles of the call.

        Raises:
            ValueError: if the prompts do not have as many placeholders as the tiles have tokens.
        """
        placeholders = ids == self.image_token_id
        number, tokens = int(placeholders.sum()), self.tokens_per_tile
        if number != tiles * tokens:
            fit = f"{number // tokens} tiles" if number % tokens == 0 else f"{number / tokens:.2f} tiles"
            raise self.input_error(
                f"Image features and image tokens do not match: the prompt has placeholders for {fit}, but there are "
                f"{tiles} (of {tokens} tokens each)"
            )
        return tile_spans(placeholder_spans(placeholders), tokens)

    def prompt_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the ids of the prompts on the CPU, `[rows, length]`.

        If the prompts are embeddings, their ids are found by comparison with the embedding matrix. A vector that is not
        a row of the matrix, such as a soft prompt, has the id -1.

        Raises:
            ValueError: if there is no prompt.
        """
        ids: Tensor | None = inputs.get("input_ids")
        if ids is not None:
            return read_once(ids)
        placeholders, embeds = self.placeholders(inputs), inputs["inputs_embeds"]
        ids = torch.full(placeholders.shape, self.image_token_id, device=embeds.device)
        ids[~placeholders] = recover_ids(embeds[~placeholders], self.model.get_input_embeddings())
        return ids.cpu()

    def split_pixels(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the pixels of each image, `[tiles, 3, height, width]` each."""
        return torch.split(self.all_tiles(inputs), [layout.tiles for layout in layouts])


class NestedTilesAdapter(TiledAdapter):
    """A family whose pixels are `[rows, tiles, 3, height, width]`; all-zero tiles are padding."""

    tower_path: ClassVar[str] = "vision_model"
    language_model_path: ClassVar[str] = "text_model"
    features_by_tile: ClassVar[bool] = False

    def all_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tiles that the tower encodes, `[tiles, 3, height, width]`; the model skips all-zero tiles."""
        tiles: Tensor = inputs[self.pixels].flatten(0, 1)
        return tiles[(tiles != 0).flatten(1).any(dim=1)]


class Span(NamedTuple):
    """A range of consecutive placeholders in one prompt row.

    Args:
        row: the prompt row.
        start: its first position.
        length: its number of placeholders.
    """

    row: int
    start: int
    length: int


def placeholder_spans(placeholders: Tensor) -> list[Span]:
    """Return the spans of consecutive placeholders in the order of the prompts.

    Args:
        placeholders: image positions, bool `[rows, length]`.
    """
    edges = F.pad(placeholders.cpu().long(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero().tolist(), (edges == -1).nonzero()[:, 1].tolist()
    return [Span(row, start, stop - start) for (row, start), stop in zip(starts, stops, strict=True)]


def tile_spans(spans: Sequence[Span], tokens: int) -> list[Span] | None:
    """Return the placeholder span of each tile; None if a span is not a whole number of tiles.

    Args:
        spans: spans of consecutive placeholders.
        tokens: number of placeholders of one tile.
    """
    if any(span.length % tokens for span in spans):
        return None
    return [Span(row, start, tokens) for row, first, length in spans for start in range(first, first + length, tokens)]


def group_tiles(spans: Sequence[Span], ids: Tensor, grouped_by: Literal["opening", "closing"]) -> list[int]:
    """Return the number of tiles of each image.

    Args:
        spans: the placeholder span of each tile; tiles without text between them belong to one image.
        ids: the prompts, `[rows, length]`.
        grouped_by: ``"opening"`` if the id before the first tile of a row opens each image, ``"closing"`` if the id
            before the last tile of a row closes each image.
    """
    text = ids.tolist()
    numbers: list[int] = []
    for row in sorted({span.row for span in spans}):
        starts = [span.start for span in spans if span.row == row]
        ends = {span.start + span.length for span in spans if span.row == row}
        before = {start: text[row][start - 1] if start else -1 for start in starts if start not in ends}
        mark = next(iter(before.values()) if grouped_by == "opening" else reversed(before.values()))
        is_open = False
        for start in starts:
            if start in ends or (is_open and not (grouped_by == "opening" and before[start] == mark)):
                numbers[-1] += 1
            else:
                numbers.append(1)
            if start in before:
                is_open = grouped_by == "opening" or before[start] != mark
    return numbers


def split_pairs(numbers: Sequence[int]) -> list[int]:
    """Return numbers of tiles with 1, 1 in place of 2, because no image has exactly one sub-image."""
    return [part for number in numbers for part in ([1, 1] if number == 2 else [number])]


def recover_ids(vectors: Tensor, embedding: nn.Module) -> Tensor:
    """Return the first token id whose embedding equals each vector, `[vectors]`; -1 if no embedding is equal.

    Args:
        vectors: embedded tokens, `[vectors, dim]`.
        embedding: the module that embeds ids.
    """
    device = vectors.device

    def embed(ids: Tensor) -> Tensor:
        embedded: Tensor = embedding(ids)
        return embedded.detach().to(device)

    vocabulary = torch.arange(len(torch.as_tensor(embedding.weight)), device=device)
    keys = torch.cat([hash_rows(embed(ids)) for ids in vocabulary.split(VOCABULARY_CHUNK)])
    keys, order = keys.sort(stable=True)
    first, last = (torch.searchsorted(keys, hash_rows(vectors), right=right) for right in (False, True))
    matches = torch.full_like(first, -1)
    open_rows = (first < last).nonzero()[:, 0]
    while len(open_rows):  # one pass, unless different embeddings have the same key
        ids = order[first[open_rows]]
        equal = (embed(ids) == vectors[open_rows]).all(dim=-1)
        matches[open_rows[equal]] = ids[equal]
        first[open_rows] += 1
        open_rows = open_rows[~equal & (first < last)[open_rows]]
    return matches


def hash_rows(vectors: Tensor) -> Tensor:
    """Return a hash of each vector over at most `KEY_COLUMNS` evenly spaced columns, int64 `[vectors]`.

    Args:
        vectors: floating point `[vectors, dim]`; equal vectors have equal hashes.
    """
    columns = torch.linspace(0, vectors.shape[1] - 1, min(KEY_COLUMNS, vectors.shape[1]), device=vectors.device).long()
    # Adding 0.0 turns -0.0 into 0.0.
    bits = (vectors.detach()[:, columns].float() + 0.0).view(torch.int32).long()
    factors = 2 * torch.arange(len(columns), device=vectors.device) + 1
    return (bits * factors * 0x1E3779B97F4A7C15).sum(dim=1)


def find_grids(sub_images: Sequence[Tensor], base_tiles: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return rows x cols of the sub-images of each image: the grid that, shrunk, differs least from the base tile.

    Images with equally many sub-images are compared together, and the differences are read from the device at once.

    Args:
        sub_images: the sub-images of each image in row-major order, `[sub_images, 3, height, width]` each.
        base_tiles: the base tile of each image, `[3, height, width]`.

    Returns:
        The grids. If several grids are equal (an image of one color), the most square grid; (0, 0) if there are no
        sub-images.
    """
    candidates = [list_grids(len(tiles)) for tiles in sub_images]
    result = [grids[0] for grids in candidates]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, tiles in enumerate(sub_images):
        if len(candidates[number]) > 1:
            groups.setdefault(tuple(tiles.shape), []).append(number)
    differences = []
    for numbers in groups.values():
        tiles = torch.stack([sub_images[number] for number in numbers])
        base = torch.stack([base_tiles[number] for number in numbers])
        columns = [grid_differences(tiles, base, grid) for grid in candidates[numbers[0]]]
        differences.append(torch.stack(columns, dim=1).flatten())
    values = iter(torch.cat(differences).tolist() if differences else ())
    for number in (number for numbers in groups.values() for number in numbers):
        by_grid = list(islice(values, len(candidates[number])))
        result[number] = candidates[number][by_grid.index(min(by_grid))]
    return result


def list_grids(number: int) -> list[tuple[int, int]]:
    """Return all rows x cols with a number of cells, the most square grid first; (0, 0) for no cells.

    Args:
        number: number of cells.
    """
    grids = [(rows, number // rows) for rows in range(1, number + 1) if number % rows == 0]
    return sorted(grids, key=lambda grid: abs(grid[0] - grid[1])) or [(0, 0)]


def grid_difference(tiles: Tensor, base: Tensor, grid: tuple[int, int]) -> float:
    """Return the mean squared difference between sub-images arranged in a grid and the base tile, both shrunk.

    Args:
        tiles: the sub-images in row-major order, `[sub_images, 3, height, width]`.
        base: the base tile, `[3, height, width]`.
        grid: rows x cols of the sub-images.
    """
    return float(grid_differences(tiles[None], base[None], grid))


def grid_differences(tiles: Tensor, base: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return `grid_difference` of several images, float32 `[images]`.

    Args:
        tiles: the sub-images of each image in row-major order, `[images, sub_images, 3, height, width]`.
        base: the base tile of each image, `[images, 3, height, width]`.
        grid: rows x cols of the sub-images.
    """
    canvas = rearrange(tiles, "images (rows cols) c h w -> images c (rows h) (cols w)", rows=grid[0])
    return (thumbnails(canvas) - thumbnails(base)).square().mean(dim=(1, 2, 3))


def thumbnails(images: Tensor) -> Tensor:
    """Return images shrunk to `THUMBNAIL_SIDE` pixels a side, `[images, 3, side, side]`.

    Args:
        images: `[images, 3, height, width]`.
    """
    return F.interpolate(images.float(), (THUMBNAIL_SIDE, THUMBNAIL_SIDE), mode="bilinear", antialias=True)
