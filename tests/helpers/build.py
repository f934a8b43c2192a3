"""Layouts of LLaVA-NeXT, computed independently of the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenprune.geometry import TileGeometry


def best_grid(image_size: tuple[int, int], tile: int, grids: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the tile grid that LLaVA-NeXT selects: the most effective pixels, then the least waste."""

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = grid[0] * tile, grid[1] * tile
        scale = min(width / image_size[1], height / image_size[0])
        used = int(image_size[1] * scale) * int(image_size[0] * scale)
        used = min(used, math.prod(image_size))
        return used, -(height * width - used)

    return max(grids, key=rank)


def token_boxes(geometry: TileGeometry, image_size: tuple[int, int], tile: int) -> Tensor:
    """Return the box of the image that each token shows, in pixels: (top, left, bottom, right), `[tiles, tokens, 4]`.

    Derived from the definition of AnyRes: the base tile is the whole image, resized to a square. On the canvas of the
    sub-images, the image is scaled to fit and centered.
    """
    token_rows, token_cols = geometry.token_grid
    boxes = torch.zeros(geometry.tiles, geometry.tokens, 4)
    height, width = image_size
    for row in range(token_rows):
        for col in range(token_cols):
            fractions = torch.tensor(
                [row / token_rows, col / token_cols, (row + 1) / token_rows, (col + 1) / token_cols]
            )
            boxes[0, row * token_cols + col] = fractions * torch.tensor([height, width, height, width])
    if not geometry.sub_images:
        return boxes
    rows, cols = geometry.tile_grid
    scale = min(rows * tile / height, cols * tile / width)
    shift_y, shift_x = (rows * tile - height * scale) / 2, (cols * tile - width * scale) / 2
    step_y, step_x = tile / token_rows, tile / token_cols
    for tile_row in range(rows):
        for tile_col in range(cols):
            for row in range(token_rows):
                for col in range(token_cols):
                    top = tile_row * tile + row * step_y - shift_y
                    left = tile_col * tile + col * step_x - shift_x
                    box = torch.tensor([top, left, top + step_y, left + step_x]) / scale
                    boxes[1 + tile_row * cols + tile_col, row * token_cols + col] = box
    return boxes
