"""Output order: in which order kept tokens enter the LLM. Repaired strategies keep the model's own; releases differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenprune.image import EncodedImage
from tokenprune.policies import OrderPolicy


def tile_numbers(kept: Tensor) -> Tensor:
    """Return the number of the tile of each token, float64 `[tiles, tokens]`."""
    return torch.arange(len(kept), dtype=torch.float64, device=kept.device)[:, None].expand(kept.shape)


@dataclass
class ScoreOrder(OrderPolicy):
    """The best token first, merged tokens last, tile by tile.

    Args:
        tiles: ``"all"``, or ``"base"`` to leave the sub-images in packed order.
    """

    tiles: Literal["all", "base"] = "all"

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, made: Tensor) -> Tensor:
        """Return the number of the tile plus the place of the token in it, `[tiles, tokens]`."""
        order = scores.masked_fill(made > 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
        place = order.argsort(dim=1).double() / order.shape[1]
        if self.tiles == "all":
            return tile_numbers(kept) + place
        rank = torch.ones_like(place)
        rank[0] = place[0]
        return rank


@dataclass
class MergedLastOrder(OrderPolicy):
    """Tile by tile, picked tokens in packed order and then merged ones."""

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, made: Tensor) -> Tensor:
        """Return the number of the tile, and half more for merged tokens, `[tiles, tokens]`."""
        return tile_numbers(kept) + 0.5 * (made > 0)
