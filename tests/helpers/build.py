"""Encoded images built by hand: random signals on any layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenprune.image import EncodedImage, TileGeometry

LAYERS, FEATURE_LAYER = 4, 2


def encoded(geometry: TileGeometry, seed: int = 0, heads: int = 3, dim: int = 5) -> EncodedImage:
    """An image with random features and CLS attention in every layer; features of invalid tokens are zero."""
    generator = torch.Generator().manual_seed(seed)
    tiles, tokens = geometry.tiles, geometry.tokens
    signals = {
        ("cls_attention", layer): torch.randn(tiles, heads, tokens + 1, generator=generator).softmax(-1)[..., 1:]
        for layer in range(LAYERS)
    }
    for layer in range(LAYERS):
        signals["joint_attention", layer] = torch.randn(tiles, 1, tokens + 1, generator=generator).softmax(-1)[..., 1:]
        signals["keys", layer] = torch.randn(tiles, heads, tokens, dim, generator=generator)
        signals["cls_features", layer] = torch.randn(tiles, 1, dim, generator=generator)
        signals["aligned_cls", layer] = torch.randn(tiles, 1, dim, generator=generator)
        signals["aligned_features", layer] = torch.randn(tiles, tokens, dim, generator=generator)
        signals["cls_logits", layer] = torch.randn(tiles, heads, tokens, generator=generator)
        signals["received_attention", layer] = torch.rand(tiles, heads, tokens, generator=generator) / tokens
        signals["vision_features", layer] = torch.randn(tiles, tokens, dim, generator=generator)
    signals["projector_inputs", FEATURE_LAYER] = torch.randn(tiles, tokens, dim, generator=generator)
    signals["question", FEATURE_LAYER] = torch.randn(2, dim, generator=generator)
    signals["question_tokens", FEATURE_LAYER] = torch.randn(4, dim, generator=generator)
    features = torch.randn(tiles, tokens, dim, generator=generator) * geometry.valid[..., None]
    signals["question_positions", FEATURE_LAYER] = torch.randn(2, 7, dim, generator=generator)
    return EncodedImage(geometry, features, signals, layers=LAYERS, feature_layer=FEATURE_LAYER)


def best_grid(image_size: tuple[int, int], tile: int, grids: list[tuple[int, int]]) -> tuple[int, int]:
    """LLaVA-NeXT's choice among tile grids: the most effective pixels, then the least waste."""

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = grid[0] * tile, grid[1] * tile
        scale = min(width / image_size[1], height / image_size[0])
        used = int(image_size[1] * scale) * int(image_size[0] * scale)
        used = min(used, math.prod(image_size))
        return used, -(height * width - used)

    return max(grids, key=rank)


def token_boxes(geometry: TileGeometry, image_size: tuple[int, int], tile: int) -> Tensor:
    """The pixels of the image that each token shows: (top, left, bottom, right), `[tiles, tokens, 4]`.

    Worked out from AnyRes itself: the base tile squeezes the whole image into a square; on the canvas of the
    sub-images it is scaled to fit and centerd.
    """
    token_rows, token_cols = geometry.token_grid
    boxes = torch.zeros(geometry.tiles, geometry.tokens, 4)
    height, width = image_size
    for row in range(token_rows):
        for col in range(token_cols):
            part = torch.tensor([row / token_rows, col / token_cols, (row + 1) / token_rows, (col + 1) / token_cols])
            boxes[0, row * token_cols + col] = part * torch.tensor([height, width, height, width])
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
