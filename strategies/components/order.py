"""Output order: sort the kept tokens that enter the LLM.

By default, strategies keep the packed order of the model. Some published implementations use a different order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenprune.image import EncodedImage
from tokenprune.policies import OrderPolicy


def tile_indices(kept: Tensor) -> Tensor:
    """Return the tile index of each token, float64 `[tiles, tokens]`."""
    return torch.arange(len(kept), dtype=torch.float64, device=kept.device)[:, None].expand(kept.shape)


@dataclass
class ScoreOrder(OrderPolicy):
    """Sorts the tokens of each tile by descending score, merged tokens last.

    Args:
        tiles: sorted tiles. ``"base"`` sorts only the base tile and keeps the sub-images in packed order.
    """

    tiles: Literal["all", "base"] = "all"

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, kind: Tensor) -> Tensor:
        """Return the tile index plus the rank of the token inside its tile as a fraction, `[tiles, tokens]`."""
        order = scores.masked_fill(kind > 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank_in_tile = order.argsort(dim=1).double() / order.shape[1]
        if self.tiles == "all":
            return tile_indices(kept) + rank_in_tile
        rank = torch.ones_like(rank_in_tile)
        rank[0] = rank_in_tile[0]
        return rank


@dataclass
class MergedLastOrder(OrderPolicy):
    """Puts the merged tokens of each tile after its picked tokens, in packed order otherwise."""

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, kind: Tensor) -> Tensor:
        """Return the tile index, plus 0.5 for merged tokens, `[tiles, tokens]`."""
        return tile_indices(kept) + 0.5 * (kind > 0)
