"""Encodes the tiles of an image at a lower resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.models._base.vision_inputs import to_floating_dtype


def encode_tiles_at_grid(
    tower: Any, tiles: Tensor, grid: tuple[int, int], feature_layer: int | Sequence[int], prefix: int
) -> Tensor:
    """Return the outputs of the feature layers for shrunk tiles, side by side, `[tiles, patches, width]`.

    Args:
        tower: a vision tower that interpolates its position embeddings.
        tiles: the pixels of an image, `[tiles, 3, height, width]`.
        grid: height x width of the patches of a tile.
        feature_layer: the value of `vision_feature_layer`: an index of the hidden states, or several.
        prefix: number of tokens before the patches.
    """
    patch = tower.config.patch_size
    small = F.interpolate(tiles.float(), (grid[0] * patch, grid[1] * patch), mode="bicubic", antialias=True)
    small = to_floating_dtype(small, tower)
    hidden = tower(small, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    layers = feature_layer if isinstance(feature_layer, (list, tuple)) else [feature_layer]
    return torch.cat([hidden[layer] for layer in layers], dim=-1)[:, prefix:]
