"""The layout of an image: its tiles, their token grids, and the order in which the model packs the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from einops import rearrange
from torch import Tensor

NEWLINE = -1
"""The value of a newline token in `TileGeometry.packed`."""
RECENT_LAYOUTS = 128
"""Number of layouts whose index tables are stored for later calls."""


def _index_table(compute: Callable[[TileGeometry], Tensor]) -> cached_property[Tensor]:
    """Return a cached property with an index table: computed once per layout, and copied once to each device."""

    def read(geometry: TileGeometry) -> Tensor:
        with torch.inference_mode(False):  # a later call may record gradients
            if geometry.original is geometry:
                return compute(geometry)
            table: Tensor = getattr(geometry.original, compute.__name__)
            return table.to(geometry.packed.device)

    read.__doc__ = compute.__doc__
    return cached_property(read)


@dataclass(frozen=True, eq=False)
class TileGeometry:
    """The layout of the tiles of one image, and the order in which the model packs their tokens.

    Tile 0 is the base tile (the downscaled whole image); tiles 1.. are the sub-images in row-major order.

    Args:
        tile_grid: rows x cols of the sub-images; (0, 0) if there is only the base tile.
        token_grid: height x width of the visual tokens of one tile.
        regions: the region of the base tile that each sub-image covers, as (top, left, bottom, right) in fractions of
            the base tile, `[sub_images, 4]`. The region of a sub-image that holds only padding is empty.
        packed: the token at each position of the packed image, `[length]`: the flat index ``tile * tokens + token`` of
            a visual token, or `NEWLINE`. Tokens that are missing here were removed by the model's own unpadding; they
            are not valid.
    """

    tile_grid: tuple[int, int]
    token_grid: tuple[int, int]
    regions: Tensor
    packed: Tensor
    entered: TileGeometry | None = field(default=None, repr=False)
    """The layout of the tokens that entered the LLM, for the layout at a later cut; None if nothing was dropped."""
    encoded: TileGeometry | None = field(default=None, repr=False)
    """The layout before the vision tower dropped or merged patches; None if it did not."""
    _copied_from: TileGeometry | None = field(default=None, repr=False)
    """The layout that `to` copied; None if this layout is no copy."""

    @property
    def original(self) -> TileGeometry:
        """The layout that `to` copied to this device, usually on the CPU; the layout itself if it is no copy."""
        source = self._copied_from  # `dataclasses.replace` also copies this field, but the result is another layout
        is_copy = source is not None and source._copies.get(self.packed.device) is self
        return source if source is not None and is_copy else self

    @property
    def sub_images(self) -> int:
        """Number of sub-images."""
        return self.tile_grid[0] * self.tile_grid[1]

    @property
    def tiles(self) -> int:
        """Number of tiles, the base tile included."""
        return 1 + self.sub_images

    @property
    def tokens(self) -> int:
        """Number of tokens of one tile."""
        return self.token_grid[0] * self.token_grid[1]

    def to(self, device: torch.device | str) -> TileGeometry:
        """Return the same layout with its tensors on a device; later calls return the same object."""
        original, device = self.original, torch.device(device)
        if device == original.packed.device:
            return original
        if device not in original._copies:
            packed = original.packed.to(device)  # its device has an index: "cuda:0" for "cuda"
            if packed.device not in original._copies:
                copy = replace(original, regions=original.regions.to(device), packed=packed, _copied_from=original)
                original._copies[packed.device] = copy
            original._copies[device] = original._copies[packed.device]
        return original._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, TileGeometry]:
        return {}

    @_index_table
    def valid(self) -> Tensor:
        """Mask of the tokens that the model's own unpadding keeps, bool `[tiles, tokens]`."""
        total = self.tiles * self.tokens
        mask = torch.zeros(total + 1, dtype=torch.bool, device=self.packed.device)
        index = torch.where(self.packed == NEWLINE, total, self.packed)  # newline tokens: additional last entry
        mask[index] = True
        return mask[:total].view(self.tiles, self.tokens)

    @cached_property
    def valid_per_tile(self) -> tuple[int, ...]:
        """Number of valid tokens of each tile, base tile first."""
        return tuple(self.original.valid.sum(dim=1).tolist()) if self.original is self else self.original.valid_per_tile

    @property
    def valid_tokens(self) -> int:
        """Number of valid tokens of all tiles."""
        return sum(self.valid_per_tile)

    @cached_property
    def newlines(self) -> int:
        """Number of newline tokens."""
        return int((self.packed == NEWLINE).sum()) if self.original is self else self.original.newlines

    @_index_table
    def token_order(self) -> Tensor:
        """Flat index of each valid token in packed order, `[valid]`."""
        return self.packed[self.packed != NEWLINE]

    @cached_property
    def flat(self) -> TileGeometry:
        """The layout of the valid tokens as one tile of a single row, in packed order, without newline tokens."""
        return TileGeometry.single((1, self.valid_tokens))

    @_index_table
    def pack_index(self) -> Tensor:
        """Index that packs the sequence of all tokens followed by all newline tokens, `[length]`."""
        is_newline = self.packed == NEWLINE
        return torch.where(is_newline, self.tiles * self.tokens + is_newline.long().cumsum(dim=0) - 1, self.packed)

    @_index_table
    def newline_index(self) -> Tensor:
        """Index of the newline token that ends the row of each packed position, `[length]`; -1 without a row.

        A row is the sequence of tokens between two newline tokens, either of the base tile or of the sub-images. Base
        tile tokens before the first row of the sub-images belong to no row.
        """
        is_newline = self.packed == NEWLINE
        row = torch.cumsum(is_newline, dim=0) - is_newline.long()
        outside = row >= self.newlines
        is_base = (self.packed < self.tokens) & ~is_newline
        last = (is_newline.nonzero()[:, 0] - 1).clamp(min=0)
        outside |= ~is_newline & (is_base != is_base[last[row.clamp(max=max(0, len(last) - 1))]] if len(last) else True)
        return row.masked_fill(outside, -1)

    @_index_table
    def token_newline(self) -> Tensor:
        """Index of the newline token that ends the row of each valid token in packed order, `[valid]`.

        Tokens without a row have the number of newline tokens.
        """
        index = self.newline_index[self.packed != NEWLINE]
        return torch.where(index < 0, self.newlines, index)

    @_index_table
    def ends_row(self) -> Tensor:
        """Mask of the newline tokens that end a row with a token, bool `[newlines]`."""
        mask = torch.zeros(self.newlines + 1, dtype=torch.bool, device=self.packed.device)
        mask[self.token_newline] = True
        return mask[: self.newlines]

    @cached_property
    def content(self) -> tuple[Hashable, ...]:
        """A key that equal layouts on the CPU share."""
        tables = (table.numpy().tobytes() for table in (self.regions, self.packed))
        return (
            self.tile_grid,
            self.token_grid,
            *tables,
            *(None if x is None else x.content for x in (self.entered, self.encoded)),
        )

    @property
    def entered_layout(self) -> TileGeometry:
        """The layout of the tokens that entered the LLM; the layout itself if no cut of the LLM dropped tokens."""
        return self if self.entered is None else self.entered

    def restrict(self, kept: Tensor) -> TileGeometry:
        """Return the layout of the kept positions, for a later cut of the LLM, on the device of `original`.

        Args:
            kept: the kept positions of the packed image, bool `[length]`.
        """
        original = self.original
        packed = original.packed[kept.to(original.packed.device)]
        return replace(original, packed=packed, entered=original.entered_layout)

    @property
    def encoded_layout(self) -> TileGeometry:
        """The layout before the vision tower dropped or merged patches; the layout itself if it did not."""
        return self if self.encoded is None else self.encoded

    def restrict_tokens(self, kept: Tensor) -> TileGeometry:
        """Return the layout with the tokens that the vision tower kept, and all newline tokens.

        Args:
            kept: the tokens whose patches remain, bool `[tiles, tokens]`.
        """
        original = self.original
        mask = kept.flatten().to(original.packed.device)[original.packed.clamp(min=0)]
        packed = original.packed[mask | (original.packed == NEWLINE)]
        return replace(original, packed=packed, encoded=original.encoded_layout)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return packed features in the order of tiles, `[tiles, tokens, dim]`; tokens that are not valid are zero.

        Args:
            packed: the visual tokens and newline tokens as they enter the LLM, `[length, dim]`.
        """
        layout, total = self.to(packed.device), self.tiles * self.tokens
        index = layout.packed.masked_fill(layout.packed == NEWLINE, total)[:, None].expand_as(packed)
        features = packed.new_zeros(total + 1, packed.shape[-1]).scatter(0, index, packed)
        return features[:total].view(self.tiles, self.tokens, -1)

    def resized(self, token_grid: tuple[int, int]) -> tuple[TileGeometry, Tensor]:
        """Return the layout of the same image at a lower resolution.

        Args:
            token_grid: height x width of the tokens of a tile, at most the current `token_grid`.

        Returns:
            The new layout on the device of `original`, and a mask of the current tokens at the centers of the new
            tokens, in the same order, bool `[tiles, tokens]`. A new token is valid if the current token at its center
            is valid.
        """
        if self.original is not self:
            return self.original.resized(token_grid)
        if token_grid == self.token_grid:  # `valid` cannot represent rows that hold only newline tokens
            return self, self.valid
        (rows, cols), (height, width) = self.tile_grid, self.token_grid

        def centers(tiles: int, old_side: int, new_side: int) -> Tensor:
            return ((2 * torch.arange(tiles * new_side) + 1) * old_side).div(2 * new_side, rounding_mode="floor")

        is_center = torch.zeros(self.tiles, height, width, dtype=torch.bool)
        is_center[0][centers(1, height, token_grid[0])[:, None], centers(1, width, token_grid[1])] = True
        base = torch.arange(math.prod(token_grid))
        if not self.sub_images:
            return replace(self, token_grid=token_grid, packed=base), is_center.flatten(1)
        to_canvas = "(rows cols) (height width) -> (rows height) (cols width)"
        sizes = {"rows": rows, "cols": cols}
        valid = rearrange(self.valid[1:].cpu(), to_canvas, height=height, width=width, **sizes)
        numbers = torch.arange(len(base), (1 + self.sub_images) * len(base)).view(self.sub_images, -1)
        numbers = rearrange(numbers, to_canvas, height=token_grid[0], width=token_grid[1], **sizes)
        ys, xs = centers(rows, height, token_grid[0]), centers(cols, width, token_grid[1])
        has_row, has_col = valid.any(dim=1)[ys], valid.any(dim=0)[xs]
        canvas = torch.zeros_like(valid)
        canvas[ys[has_row][:, None], xs[has_col]] = True
        is_center[1:] = rearrange(
            canvas, "(rows height) (cols width) -> (rows cols) height width", height=height, width=width, **sizes
        )
        numbers = numbers[has_row][:, has_col]
        if self.newlines and numbers.numel():
            numbers = torch.cat([numbers, torch.full((len(numbers), 1), NEWLINE)], dim=1)
        base_first = bool(self.packed[0] < self.tokens)
        parts = [base, numbers.flatten()] if base_first else [numbers.flatten(), base]
        return replace(self, token_grid=token_grid, packed=torch.cat(parts)), is_center.flatten(1)

    @classmethod
    def single(cls, token_grid: tuple[int, int]) -> TileGeometry:
        """Return the layout of one tile without newline tokens, as in LLaVA-1.5."""
        return cls((0, 0), token_grid, torch.zeros(0, 4), torch.arange(token_grid[0] * token_grid[1]))

    @classmethod
    def tiled(cls, tile_grid: tuple[int, int], token_grid: tuple[int, int], base_first: bool) -> TileGeometry:
        """Return the layout of an image in equal sub-images, packed tile by tile without newline tokens.

        Args:
            tile_grid: rows x cols of the sub-images.
            token_grid: height x width of the tokens of a tile.
            base_first: whether the base tile is packed before the sub-images, or after them.
        """
        (rows, cols), tokens = tile_grid, math.prod(token_grid)
        edges = torch.tensor([[r, c, r + 1, c + 1] for r in range(rows) for c in range(cols)], dtype=torch.float32)
        regions = edges.view(-1, 4) / torch.tensor([rows, cols, rows, cols]).clamp(min=1)
        order = torch.arange((1 + rows * cols) * tokens)
        return cls(tile_grid, token_grid, regions, order if base_first else order.roll(-tokens))

    @classmethod
    def anyres(
        cls, image_size: tuple[int, int], tile_grid: tuple[int, int], token_grid: tuple[int, int], tile_size: int
    ) -> TileGeometry:
        """Return the layout of an image under LLaVA-NeXT's AnyRes.

        The base tile is the image resized to a square. The sub-images divide a canvas, on which the image is scaled to
        fit and centered. Rows of the canvas end with a newline token.

        Args:
            image_size: height x width of the image in pixels.
            tile_grid: rows x cols of the sub-images.
            token_grid: height x width of the tokens of a tile.
            tile_size: side of a tile in pixels.
        """
        rows, cols = tile_grid
        canvas = torch.arange(1, 1 + rows * cols).view(rows, cols)
        index = rearrange(
            canvas[..., None, None] * math.prod(token_grid) + torch.arange(math.prod(token_grid)).view(*token_grid),
            "rows cols height width -> (rows height) (cols width)",
        )
        top, left = _unpadding(image_size, (index.shape[0], index.shape[1]))
        index = index[top : index.shape[0] - top, left : index.shape[1] - left]
        newline = torch.full((index.shape[0], 1), NEWLINE)
        packed = torch.cat([torch.arange(math.prod(token_grid)), torch.cat([index, newline], dim=1).flatten()])
        return cls(tile_grid, token_grid, anyres_regions(image_size, tile_grid, tile_size), packed)


@dataclass(frozen=True)
class _LayoutContent:
    """A layout that equals another one if their tables are equal."""

    key: tuple[Hashable, ...]
    layout: TileGeometry = field(compare=False)


@lru_cache(maxsize=RECENT_LAYOUTS)
def _copy_layout(content: _LayoutContent) -> TileGeometry:
    layout = content.layout
    with torch.inference_mode(False):  # a later call may record gradients
        return replace(layout, regions=layout.regions.clone(), packed=layout.packed.clone())


def share_layouts(layouts: Sequence[TileGeometry]) -> list[TileGeometry]:
    """Return the layouts with one object for equal layouts, also those of recent calls.

    Images of one object are reduced together, and its index tables are computed and copied to a device once.

    Args:
        layouts: the layout of each image.
    """
    if any(layout.packed.device.type != "cpu" for layout in layouts):  # comparing them would read from the device
        return list(layouts)
    return [_copy_layout(_LayoutContent(layout.content, layout)) for layout in layouts]


def _unpadding(image_size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the numbers of token rows and columns that LLaVA-NeXT removes at each side of the canvas.

    The rounding equals the original `unpad_image`, because token counts depend on it.
    """
    height, width = image_size
    if width / height > canvas[1] / canvas[0]:
        return (canvas[0] - int(round(height * (canvas[1] / width), 7))) // 2, 0
    return 0, (canvas[1] - int(round(width * (canvas[0] / height), 7))) // 2


def anyres_regions(image_size: tuple[int, int], tile_grid: tuple[int, int], tile_size: int) -> Tensor:
    """Return the region of the image that each sub-image of an AnyRes canvas shows, `[sub_images, 4]`.

    Args:
        image_size: height x width of the image in pixels.
        tile_grid: rows x cols of the sub-images.
        tile_size: side of a tile in pixels.

    Returns:
        (top, left, bottom, right) in fractions of the image, `[sub_images, 4]`.
    """
    canvas = (tile_grid[0] * tile_size, tile_grid[1] * tile_size)
    scale = min(canvas[0] / image_size[0], canvas[1] / image_size[1])
    edges = []
    for tiles, side, original in zip(tile_grid, canvas, image_size, strict=True):
        content = min(math.ceil(original * scale), side)  # the processor does not round `scale` either
        offset = (side - content) // 2
        edges.append(((torch.arange(tiles + 1) * tile_size - offset) / content).clamp(0.0, 1.0))
    rows, cols = edges
    return torch.stack(
        [
            torch.stack([rows[row], cols[col], rows[row + 1], cols[col + 1]])
            for row in range(tile_grid[0])
            for col in range(tile_grid[1])
        ]
    )


def region_coverage(regions: Tensor, token_grid: tuple[int, int]) -> Tensor:
    """Return the fraction of each base tile token that lies inside each region, `[regions, tokens]`.

    Args:
        regions: (top, left, bottom, right) in fractions of the tile, `[regions, 4]`.
        token_grid: height x width of the tokens of the tile.

    Returns:
        Fractions of the area of a token, `[regions, tokens]`.
    """

    def overlap(start: Tensor, stop: Tensor, tokens: int) -> Tensor:
        edge = torch.arange(tokens, dtype=regions.dtype, device=regions.device)
        inside = torch.minimum(stop[:, None] * tokens, edge + 1) - torch.maximum(start[:, None] * tokens, edge)
        return inside.clamp(0.0, 1.0)

    top, left, bottom, right = regions.unbind(dim=1)
    rows, cols = overlap(top, bottom, token_grid[0]), overlap(left, right, token_grid[1])
    return rearrange(rows[:, :, None] * cols[:, None, :], "regions height width -> regions (height width)")
