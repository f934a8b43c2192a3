"""Conversion of masks and mixtures of one sequence of valid tokens to the tiles of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.geometry import TileGeometry


def unflatten_mask(mask: Tensor, geometry: TileGeometry) -> Tensor:
    """Return a mask of the tokens of the tiles, bool `[tiles, tokens]`.

    Args:
        mask: mask of the valid tokens in packed order, bool `[valid]`.
        geometry: the layout of the image, on the device of the mask.
    """
    flat = torch.zeros(geometry.tiles * geometry.tokens, dtype=torch.bool, device=mask.device)
    return flat.scatter(0, geometry.token_order, mask).view(geometry.tiles, geometry.tokens)


def unflatten_mixing(rows: Tensor, geometry: TileGeometry) -> Tensor:
    """Return mixtures of the tokens of the tiles, `[kept, tiles * tokens]`.

    Args:
        rows: mixtures of the valid tokens in packed order, `[kept, valid]`.
        geometry: the layout of the image, on the device of the mixtures.
    """
    mixing = rows.new_zeros(len(rows), geometry.tiles * geometry.tokens)
    return mixing.index_copy(1, geometry.token_order, rows)
