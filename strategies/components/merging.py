"""Merging policies: how dropped tokens live on in those that enter the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenprune.image import EncodedImage, Signal, region_coverage
from tokenprune.layers import LayerChoice
from tokenprune.policies import Merged, MergingPolicy, identity_weights
from tokenprune.strategies.components.selection import evenly_spaced

RELEASED = "release"
"""Weights as the published code has them."""


def representative_index(scores: Tensor, dropped: Tensor) -> int:
    """Return the place of a token that stands for all dropped ones: that of the best of them.

    Args:
        scores: the larger the better, `[tokens]`.
        dropped: dropped tokens, bool `[tokens]`.
    """
    return int(scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~dropped, -torch.inf).argmax())


@dataclass
class MeanOfRestMerging(MergingPolicy):
    """One more token per tile: the mean of those that were dropped (TRIM)."""

    before_projector: ClassVar[bool] = True

    @property
    def needs(self) -> Sequence[Signal]:
        """The inputs of the projector."""
        return (Signal("projector_inputs"),)

    def reserve(self, budgets: Tensor, room: Tensor) -> Tensor:
        """Return one token for every tile that keeps some and drops some."""
        return budgets.clamp(max=1) * (budgets < room)

    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Put the mean of the dropped tokens in the place of the best of them."""
        made = torch.zeros_like(picked, dtype=torch.long)
        weights = identity_weights(picked)
        for tile in reserved.nonzero()[:, 0].tolist():
            dropped = candidates[tile] & ~picked[tile]
            place = representative_index(scores[tile], dropped)
            made[tile, place] = 1
            weights[tile, place] = dropped / dropped.sum()
        return Merged(made, weights)


@dataclass
class NeighborMerging(MergingPolicy):
    """Every kept token takes up its nearest neighbors, weighted by attention; one token holds the rest (PruMerge).

    With ``a`` the attention of CLS and the neighbors ``j`` of token ``i`` those with the most similar keys:
    ``(x_i + sum_j a_j x_j) / (1 + sum_j a_j)``; the rest is ``sum_j a_j x_j / sum_j a_j`` over all tokens that were not
    kept, in the place of the one with the largest score.

    Args:
        neighbors: how many neighbors a token takes up; kept ones may be among them.
        layer: layer of the vision tower whose attention and keys are read.
        weights: ``"mean"`` as above; ``"release"`` leaves both divisions out, as the published code does: then the
            length of a token depends on its attention.
    """

    neighbors: int = 32
    layer: LayerChoice = -1
    weights: Literal["mean", "release"] = "mean"

    before_projector: ClassVar[bool] = True

    @property
    def needs(self) -> Sequence[Signal]:
        """Attention over all heads as one, keys, and the inputs of the projector."""
        return (Signal("joint_attention", self.layer), Signal("keys", self.layer), Signal("projector_inputs"))

    def reserve(self, budgets: Tensor, room: Tensor) -> Tensor:
        """Return one token, for the rest, for every tile that keeps some and drops some; the release always does."""
        return budgets.clamp(max=1) * ((budgets < room) | (self.weights == RELEASED))

    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Add neighbors to kept tokens and make one token of the rest."""
        attention = image.joint_attention(self.layer)[:, 0]
        keys = rearrange(image.keys(self.layer), "tiles heads tokens dim -> tiles tokens (heads dim)")
        keys = F.normalize(keys, dim=-1)
        made = torch.zeros_like(picked, dtype=torch.long)
        weights = identity_weights(picked)
        for tile, reserve in enumerate(reserved.tolist()):
            own = picked[tile].nonzero()[:, 0]
            likeness = keys[tile, own] @ keys[tile].T
            likeness.masked_fill_(~candidates[tile], -torch.inf)
            likeness[torch.arange(len(own)), own] = -torch.inf
            others = int(candidates[tile].sum()) - 1
            near = likeness.topk(min(self.neighbors, max(others, 0)), dim=1)[1]
            rows = weights[tile, own].scatter_add(1, near, attention[tile][near])
            weights[tile, own] = rows / rows.sum(dim=1, keepdim=True) if self.weights == "mean" else rows
            dropped = candidates[tile] & ~picked[tile]
            if reserve and bool(dropped.any()):
                place = representative_index(scores[tile], dropped)
                made[tile, place] = 1
                rest = attention[tile] * dropped
                if self.weights == "mean":  # without attention on any of them, they count alike
                    rest = rest / rest.sum() if bool(rest.sum() > 0) else dropped / dropped.sum()
                weights[tile, place] = rest
        return Merged(made, weights)


@dataclass
class ContextualMerging(MergingPolicy):
    """Some of the tokens that were not picked become targets, and every other one joins the most similar (VisionZip).

    Likeness is the cosine of keys, mean over heads.

    Args:
        share: share of a tile's budget for targets.
        layer: layer of the vision tower whose keys are read.
        number: targets of every tile, instead of a share.
        combine: ``"mean"`` makes a target the mean of itself and those that joined it; ``"sum"`` adds their mean to it,
            as the release does, which doubles its length.
        spacing: ``"even"`` spreads targets over the tokens that were not picked; ``"step"`` takes every whole step
            from the first one on, as the release does, which leaves the end out.
        cls: spend one token of each tile on its CLS token, as the release does.
    """

    share: float = 10 / 64
    layer: LayerChoice = "feature"
    number: int | None = None
    combine: Literal["mean", "sum"] = "mean"
    spacing: Literal["even", "step"] = "even"
    cls: bool = False

    before_projector: ClassVar[bool] = True

    @property
    def needs(self) -> Sequence[Signal]:
        """Keys, the inputs of the projector, and CLS if it is kept."""
        needs = [Signal("keys", self.layer), Signal("projector_inputs")]
        return [*needs, Signal("cls_features")] if self.cls else needs

    def reserve(self, budgets: Tensor, room: Tensor) -> Tensor:
        """Return the number of targets, and one more for CLS if it is kept."""
        share, number = (budgets * self.share).round().long(), self.number
        targets = share if number is None else torch.full_like(budgets, number)
        return (targets + self.cls).minimum(budgets) * (budgets < room)

    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Choose targets and let the others join them."""
        keys = F.normalize(image.keys(self.layer).mean(dim=1), dim=-1)
        made = torch.zeros_like(picked, dtype=torch.long)
        weights = F.pad(identity_weights(picked), (0, int(self.cls)))
        for tile in reserved.nonzero()[:, 0].tolist():
            rest = (candidates[tile] & ~picked[tile]).nonzero()[:, 0]
            number = int(reserved[tile]) - self.cls
            step = max(1, len(rest) // max(1, number))
            even = self.spacing == "even"
            at = evenly_spaced(len(rest), number) if even else torch.arange(0, len(rest), step)[:number]
            is_target = torch.zeros_like(rest, dtype=torch.bool)
            is_target[at.to(rest.device)] = True
            targets, others = rest[is_target], rest[~is_target]
            made[tile, targets] = 1
            if self.cls:
                valid = image.geometry.valid[tile].to(rest.device)[others]
                place = (others[valid] if bool(valid.any()) else others)[-1]
                made[tile, place] = 2  # CLS has no place in the grid; that of a dropped token is free
                weights[tile, place] = F.one_hot(torch.tensor(weights.shape[2] - 1), weights.shape[2])
            if not len(targets) or not len(others):
                continue
            joins = (keys[tile, others] @ keys[tile, targets].T).argmax(dim=1)
            members = F.one_hot(joins, len(targets)).T.to(weights.dtype)  # [targets, others]
            counts = members.sum(dim=1, keepdim=True)
            if self.combine == "sum":
                weights[tile, targets[:, None], others] = members / counts.clamp(min=1)
            else:
                weights[tile, targets[:, None], others] = members / (1 + counts)
                weights[tile, targets, targets] = 1 / (1 + counts[:, 0])
        return Merged(made, weights)


@dataclass
class PooledGridMerging(MergingPolicy):
    """The tile's valid rectangle is cut into as many cells as it may keep tokens, and each cell becomes its mean.

    Any number of cells works: they lie in bands of equal height, some of which hold one cell more than others. Where a
    cell cuts through tokens, they count by area.
    """

    def reserve(self, budgets: Tensor, room: Tensor) -> Tensor:
        """Return the whole budget, so that nothing is picked, unless nothing is dropped."""
        return budgets * (budgets < room)

    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Put the mean of each cell in the place of the token at its center."""
        height, width = image.geometry.token_grid
        made = torch.zeros_like(picked, dtype=torch.long)
        weights = identity_weights(picked)
        for tile, number in enumerate(reserved.tolist()):
            if not number:
                continue
            grid = candidates[tile].view(height, width)
            down, across = grid.any(dim=1).nonzero()[:, 0], grid.any(dim=0).nonzero()[:, 0]
            top, left, rows, cols = int(down[0]), int(across[0]), len(down), len(across)
            cells = bands_of_cells(number, rows, cols)
            cells = cells * torch.tensor([rows, cols, rows, cols]) + torch.tensor([top, left, top, left])
            places = (cells[:, 0] + cells[:, 2]).div(2).floor() * width + (cells[:, 1] + cells[:, 3]).div(2).floor()
            places = places.long().to(picked.device)
            inside = region_coverage((cells / torch.tensor([height, width, height, width])).float(), (height, width))
            inside = inside.to(picked.device) * candidates[tile]
            made[tile, places] = 1
            weights[tile, places] = inside / inside.sum(dim=1, keepdim=True)
        return Merged(made, weights)


def bands_of_cells(number: int, rows: int, cols: int) -> Tensor:
    """Cut a rectangle of tokens into a number of cells, none smaller than a token.

    Args:
        number: cells, at most ``rows * cols``.
        rows: height of the rectangle in tokens.
        cols: width of the rectangle in tokens.

    Returns:
        (top, left, bottom, right) of each cell in fractions of the rectangle, row by row, float64 `[number, 4]`.
    """
    least = -(-number // cols)
    bands = min(max(least, round((number * rows / cols) ** 0.5), 1), rows, number)
    cells = []
    for band in range(bands):
        here = number * (band + 1) // bands - number * band // bands
        for cell in range(here):
            cells.append([band / bands, cell / here, (band + 1) / bands, (cell + 1) / here])
    return torch.tensor(cells, dtype=torch.float64)
