"""What the adapters share whose images are tiles of one size: how the tiles of a call are grouped and laid out.

Processors of these families keep the grid to themselves: the model is given tiles and a prompt. Both say it all the
same. Tiles are grouped by the text between runs of placeholders, and the grid of a picture is the one in which its
tiles, put together and shrunk, look like its base tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenprune.image import TileGeometry
from tokenprune.models.example import EXAMPLE_TILE, seeded
from tokenprune.models.placeholder import PlaceholderAdapter

LOOK = 32
"""Side in pixels at which tiles and base tile are compared."""


class TiledAdapter(PlaceholderAdapter):
    """A family whose images are tiles of one size, cut evenly from the picture, and the whole picture as base tile."""

    grouped_by: ClassVar[Literal["opening", "closing"]] = "opening"
    """What the id before a run of placeholders says: that of the row's first run opens an image (``"opening"``), or
    that of its last run closes one (``"closing"``)."""
    features_by_tile: ClassVar[bool] = True
    base_first: ClassVar[bool] = False

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image, from the prompt and the pixels.

        Raises:
            ValueError: if the prompt has no ids, or its placeholders do not fit the tiles.
        """
        tiles = self.all_tiles(inputs)
        numbers = self.tiles_per_image(inputs)
        if sum(numbers) != len(tiles):
            raise ValueError(
                f"Image features and image tokens do not match: the prompt has places for {sum(numbers)} tiles, but "
                f"there are {len(tiles)}; make the inputs with the processor that belongs to the model"
            )
        parts = tiles.split(numbers)
        return [self.layout(one, grid) for one, grid in zip(parts, self.grids(inputs, parts), strict=True)]

    def layout(self, tiles: Tensor, grid: tuple[int, int]) -> TileGeometry:
        """Return the layout of one image.

        Args:
            tiles: its tiles in the model's order, `[tiles, 3, height, width]`.
            grid: rows x cols of its sub-images.
        """
        return TileGeometry.tiled(grid, self.token_grid, self.base_first)

    def grids(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return rows x cols of the sub-images of each image; by the pixels, where the prompt does not say it.

        Args:
            inputs: the model inputs of the call.
            parts: the tiles of each image in the model's order, `[tiles, 3, height, width]` each.
        """
        ordered = [one if self.base_first else one.roll(1, 0) for one in parts]
        return [find_grid(one[1:], one[0]) for one in ordered]

    def ids_behind(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[list[int]]:
        """Return the id behind each tile of each image, where every tile has its own run of placeholders."""
        ids = F.pad(inputs["input_ids"], (0, 1), value=-1)
        behind = [int(ids[run.row, run.start + run.length]) for run in runs(ids == self.image_token_id)]
        ends = torch.tensor([len(one) for one in parts], dtype=torch.long).cumsum(0).tolist()
        return [behind[end - len(one) : end] for one, end in zip(parts, ends, strict=True)]

    def all_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tiles that the tower sees, `[tiles, 3, height, width]`."""
        pixels: Tensor = inputs[self.pixels]
        return pixels

    def tiles_per_image(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the number of tiles of each image, in the order of the prompt."""
        ids = self.prompt_ids(inputs)
        tokens = self.token_grid[0] * self.token_grid[1]
        return group_tiles(runs(ids == self.image_token_id), ids, tokens, self.grouped_by)

    def prompt_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the ids of the prompts, `[rows, length]`.

        Raises:
            ValueError: if the prompt is given as embeddings: text that separates images cannot be read there.
        """
        ids: Tensor | None = inputs.get("input_ids")
        if ids is None:
            raise ValueError(
                f"which tiles belong to one image stands in the text of the prompt of {self.model_class}; pass "
                "input_ids instead of inputs_embeds"
            )
        return ids

    def tiles_of(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the pixels of each image, `[tiles, 3, height, width]` each."""
        return torch.split(self.all_tiles(inputs), [layout.tiles for layout in layouts])

    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the tiles of each picture, in the model's order."""
        return {self.pixels: torch.cat([self.example_tiles(size) for size in sizes])}

    def example_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return rows x cols of the tiles of an example picture: as many as fit, at most two a side."""
        rows, cols = (min(2, max(1, round(side / EXAMPLE_TILE))) for side in size)
        return rows, cols

    def example_tiles(self, size: tuple[int, int]) -> Tensor:
        """Return the tiles of an example picture, `[tiles, 3, side, side]`."""
        rows, cols = self.example_grid(size)
        canvas = torch.randn(3, rows * EXAMPLE_TILE, cols * EXAMPLE_TILE, generator=seeded(size))
        base = F.interpolate(canvas[None], (EXAMPLE_TILE, EXAMPLE_TILE), mode="bilinear", antialias=True)
        if rows * cols == 1:
            return base
        parts = rearrange(canvas, "c (rows h) (cols w) -> (rows cols) c h w", rows=rows, cols=cols)
        return torch.cat([base, parts] if self.base_first else [parts, base])

    def example_inputs(self, rows: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
        """Return inputs with random pixels."""
        sizes = dict.fromkeys(size for row in rows for size in row)
        return self.example_prompts(rows, {size: self.example_ids(self.example_grid(size)) for size in sizes})

    def example_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the ids that stand for a picture; 8 opens it, or stands before its base tile, and 9 closes it.

        Args:
            grid: rows x cols of its sub-images; of a picture in one piece (1, 1).
        """
        pieces = grid[0] * grid[1]
        number = pieces + int(pieces > 1)
        if self.grouped_by == "closing":
            return [*[10, *self.example_tile] * (number - 1), 8, *self.example_tile, 9]
        return [8, *self.example_tile * number, 9]

    @property
    def example_tile(self) -> list[int]:
        """The placeholders of one tile."""
        return [self.image_token_id] * (self.token_grid[0] * self.token_grid[1])


class Run(NamedTuple):
    """A stretch of placeholders without text between them, in one prompt row.

    Args:
        row: the prompt row.
        start: its first position.
        length: its number of placeholders.
    """

    row: int
    start: int
    length: int


def runs(placeholders: Tensor) -> list[Run]:
    """Return the stretches of placeholders in the order of the prompts.

    Args:
        placeholders: image positions, bool `[rows, length]`.
    """
    edges = F.pad(placeholders.cpu().long(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero().tolist(), (edges == -1).nonzero()[:, 1].tolist()
    return [Run(row, start, stop - start) for (row, start), stop in zip(starts, stops, strict=True)]


def group_tiles(found: Sequence[Run], ids: Tensor, tokens: int, by: Literal["opening", "closing"]) -> list[int]:
    """Return the number of tiles of each image.

    Args:
        found: the runs of placeholders.
        ids: the prompts, `[rows, length]`.
        tokens: placeholders of one tile; a run can hold several tiles.
        by: whether the id before the row's first run opens an image, or the one before its last run closes one.

    Raises:
        ValueError: if a run is no whole number of tiles.
    """
    numbers: list[int] = []
    for row in sorted({run.row for run in found}):
        own = [run for run in found if run.row == row]
        before = [int(ids[row, run.start - 1]) if run.start else -1 for run in own]
        mark, open_image = (before[0] if by == "opening" else before[-1]), False
        for run, one in zip(own, before, strict=True):
            if run.length % tokens:
                raise ValueError(
                    f"Image features and image tokens do not match: {run.length} placeholders in a row are no whole "
                    f"number of tiles of {tokens} tokens; make the inputs with the processor that belongs to the model"
                )
            if open_image and not (by == "opening" and one == mark):
                numbers[-1] += run.length // tokens
            else:
                numbers.append(run.length // tokens)
            open_image = by == "opening" or one != mark
    return numbers


def find_grid(tiles: Tensor, base: Tensor) -> tuple[int, int]:
    """Return rows x cols of the tiles of a picture: the grid that looks like the base tile when it is shrunk.

    Args:
        tiles: the sub-images in row-major order, `[sub_images, 3, height, width]`.
        base: the whole picture, `[3, height, width]`.

    Returns:
        The grid; of equal ones (a picture of one colour) the most square. (0, 0) if there are no sub-images.
    """
    number = len(tiles)
    if number == 0:
        return 0, 0
    grids = [(rows, number // rows) for rows in range(1, number + 1) if number % rows == 0]
    if len(grids) == 1:
        return grids[0]
    return min(sorted(grids, key=lambda one: abs(one[0] - one[1])), key=lambda one: grid_difference(tiles, base, one))


def grid_difference(tiles: Tensor, base: Tensor, grid: tuple[int, int]) -> float:
    """Return how much tiles put together in a grid differ from the base tile, both shrunk: mean squared difference.

    Args:
        tiles: the sub-images in row-major order, `[sub_images, 3, height, width]`.
        base: the whole picture, `[3, height, width]`.
        grid: rows x cols of the sub-images.
    """
    canvas = rearrange(tiles, "(rows cols) c h w -> c (rows h) (cols w)", rows=grid[0])
    return float((looked_at(canvas) - looked_at(base)).square().mean())


def looked_at(picture: Tensor) -> Tensor:
    """Return a picture shrunk to `LOOK` pixels a side, `[3, height, width]` to `[3, LOOK, LOOK]`."""
    return F.interpolate(picture[None].float(), (LOOK, LOOK), mode="bilinear", antialias=True)[0]
