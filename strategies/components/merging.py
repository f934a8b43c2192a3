"""Merging policies: combine dropped tokens into tokens that enter the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenprune.geometry import region_coverage
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import Merged, MergingPolicy, identity_weights

RELEASE_WEIGHTS = "release"
"""Option value that selects the weights of the published code."""


def representative_index(scores: Tensor, dropped: Tensor) -> int:
    """Return the index of the dropped token with the largest score; its position receives the merged token.

    Args:
        scores: scores of the tokens, `[tokens]`.
        dropped: mask of dropped tokens, bool `[tokens]`.
    """
    return int(scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~dropped, -torch.inf).argmax())


@dataclass
class MeanOfRestMerging(MergingPolicy):
    """Adds one token per tile, the mean of its dropped tokens (TRIM)."""

    before_projector: ClassVar[bool] = True

    @property
    def needs(self) -> Sequence[Signal]:
        """The inputs of the projector."""
        return (Signal("projector_inputs"),)

    def reserve(self, budgets: Tensor, capacity: Tensor) -> Tensor:
        """Return one token for every tile that both keeps and drops tokens, `[tiles]`."""
        return budgets.clamp(max=1) * (budgets < capacity)

    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Insert the mean of the dropped tokens at the position of the dropped token with the largest score."""
        kind = torch.zeros_like(picked, dtype=torch.long)
        weights = identity_weights(picked)
        for tile in reserved.nonzero()[:, 0].tolist():
            dropped = candidates[tile] & ~picked[tile]
            index = representative_index(scores[tile], dropped)
            kind[tile, index] = 1
            weights[tile, index] = dropped / dropped.sum()
        return Merged(kind, weights)


@dataclass
class NeighborMerging(MergingPolicy):
    """Merges each kept token with its nearest neighbors, and the dropped tokens into one additional token (PruMerge).

    ``a`` is the CLS attention, and the neighbors ``j`` of token ``i`` are the tokens with the most similar keys. A kept
    token becomes ``(x_i + sum_j a_j x_j) / (1 + sum_j a_j)``. The additional token is ``sum_j a_j x_j / sum_j a_j``
    over all dropped tokens. It is inserted at the position of the dropped token with the largest score.

    Args:
        neighbors: number of neighbors per kept token. Other kept tokens can be among them.
        layer: layer of the vision tower whose attention and keys are read.
        weights: ``"mean"`` uses the equations above. ``"release"`` omits both divisions, as the published code does.
            The norm of a token then depends on its attention.
    """

    neighbors: int = 32
    layer: LayerChoice = -1
    weights: Literal["mean", "release"] = "mean"

    before_projector: ClassVar[bool] = True

    @property
    def needs(self) -> Sequence[Signal]:
        """The joint attention of all heads, the keys, and the inputs of the projector."""
        return (Signal("joint_attention", self.layer), Signal("keys", self.layer), Signal("projector_inputs"))

    def reserve(self, budgets: Tensor, capacity: Tensor) -> Tensor:
        """Return one token for every tile that both keeps and drops tokens, `[tiles]`.

        With the weights of the release, return one token for every tile that keeps tokens.
        """
        return budgets.clamp(max=1) * ((budgets < capacity) | (self.weights == RELEASE_WEIGHTS))

    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Merge kept tokens with their neighbors, and dropped tokens into one additional token."""
        attention = image.joint_attention(self.layer)[:, 0]
        keys = rearrange(image.keys(self.layer), "tiles heads tokens dim -> tiles tokens (heads dim)")
        keys = F.normalize(keys, dim=-1)
        kind = torch.zeros_like(picked, dtype=torch.long)
        weights = identity_weights(picked)
        for tile, reserve in enumerate(reserved.tolist()):
            kept = picked[tile].nonzero()[:, 0]
            similarity = keys[tile, kept] @ keys[tile].T
            similarity.masked_fill_(~candidates[tile], -torch.inf)
            similarity[torch.arange(len(kept)), kept] = -torch.inf
            n_neighbors = min(self.neighbors, max(int(candidates[tile].sum()) - 1, 0))
            nearest = similarity.topk(n_neighbors, dim=1)[1]
            rows = weights[tile, kept].scatter_add(1, nearest, attention[tile][nearest])
            weights[tile, kept] = rows / rows.sum(dim=1, keepdim=True) if self.weights == "mean" else rows
            dropped = candidates[tile] & ~picked[tile]
            if reserve and bool(dropped.any()):
                index = representative_index(scores[tile], dropped)
                kind[tile, index] = 1
                row = attention[tile] * dropped
                if self.weights == "mean":  # if no dropped token draws attention, all have the same weight
                    row = row / row.sum() if bool(row.sum() > 0) else dropped / dropped.sum()
                weights[tile, index] = row
        return Merged(kind, weights)


@dataclass
class ContextualMerging(MergingPolicy):
    """Merges dropped tokens into the most similar of several target tokens, which are sampled from them (VisionZip).

    The similarity is the cosine of the keys, averaged over heads.

    Args:
        share: share of the budget of a tile for targets.
        layer: layer of the vision tower whose keys are read.
        number: number of targets in every tile, instead of a share.
        combine: ``"mean"`` replaces a target by the mean of itself and the tokens merged into it. ``"sum"`` adds the
            mean of these tokens to the target, as the release does, which doubles its norm.
        spacing: ``"even"`` distributes the targets over all tokens that were not picked. ``"step"`` starts at the first
            token and rounds the step down, as the release does, so the last tokens never become targets.
        cls: whether to spend one token of each tile on its CLS token, as the release does.
    """

    share: float = 10 / 64
    layer: LayerChoice = "feature"
    number: int | None = None
    combine: Literal["mean", "sum"] = "mean"
    spacing: Literal["even", "step"] = "even"
    cls: bool = False

    before_projector: ClassVar[bool] = True

    @property
    def is_exact(self) -> bool:
        """Whether every tile gets its reserved number of merged tokens."""
        return True

    @property
    def needs(self) -> Sequence[Signal]:
        """The keys, the inputs of the projector, and the CLS tokens if they are kept."""
        needs = [Signal("keys", self.layer), Signal("projector_inputs")]
        return [*needs, Signal("cls_features")] if self.cls else needs

    def reserve(self, budgets: Tensor, capacity: Tensor) -> Tensor:
        """Return the number of targets, plus one if the CLS token is kept, `[tiles]`."""
        share, number = (budgets * self.share).round().long(), self.number
        targets = share if number is None else torch.full_like(budgets, number)
        reserved = targets + 1 if self.cls else targets
        return reserved.minimum(budgets) * (budgets < capacity)

    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Sample the targets, and merge the remaining dropped tokens into them."""
        keys = F.normalize(image.keys(self.layer).mean(dim=1), dim=-1)
        dropped = candidates & ~picked & (reserved > 0)[:, None]
        number = ((reserved - 1).clamp(min=0) if self.cls else reserved)[:, None]
        is_target = dropped & sample_mask(dropped, number, self.spacing)
        is_source = dropped & ~is_target
        similarity = (keys @ keys.transpose(1, 2)).masked_fill(~is_target[:, None], -torch.inf)
        target = similarity.argmax(dim=2)
        is_member = (is_source & is_target.gather(1, target)).to(similarity.dtype)
        members = torch.zeros_like(similarity).scatter(
            1, target[:, None], is_member[:, None]
        )  # [tiles, targets, sources]
        counts = torch.zeros_like(is_member).scatter_add(1, target, is_member)[..., None]
        if self.combine == "sum":
            weights = identity_weights(picked) + members / counts.clamp(min=1)
        else:
            weights = (identity_weights(picked) + members) / (1 + counts)
        kind = is_target.long()
        if not self.cls:
            return Merged(kind, weights)
        # CLS has no position in the grid, so it takes the position of the last dropped token, a valid one if possible.
        index = torch.arange(picked.shape[1], device=picked.device)
        last = index.masked_fill(~is_source, -1).amax(dim=1, keepdim=True)
        last_valid = index.masked_fill(~(is_source & image.geometry.to(picked.device).valid), -1).amax(
            dim=1, keepdim=True
        )
        is_cls = (index == torch.where(last_valid < 0, last, last_valid)) & dropped
        cls_row = F.one_hot(index.new_full((1, 1), picked.shape[1]), picked.shape[1] + 1).to(weights.dtype)
        weights = torch.where(is_cls[..., None], cls_row, F.pad(weights, (0, 1)))
        return Merged(kind + 2 * is_cls, weights)


def sample_mask(mask: Tensor, number: Tensor, spacing: str) -> Tensor:
    """Return samples of the true entries of each row, bool `[rows, entries]`; entries outside the mask are undefined.

    Args:
        mask: bool `[rows, entries]`.
        number: number of samples of each row, `[rows, 1]`.
        spacing: ``"even"`` takes sample n at ``(2 n + 1) / (2 number)`` of the true entries, ``"step"`` takes every
            (count // number)-th true entry from the first.
    """
    count, n = mask.sum(dim=1, keepdim=True), torch.arange(mask.shape[1], device=mask.device)
    divisor = number.clamp(min=1)
    if spacing == "even":
        rank = ((2 * n + 1) * count).div(2 * divisor, rounding_mode="floor")
    else:
        rank = n * count.div(divisor, rounding_mode="floor").clamp(min=1)
    rank = torch.where((n < number) & (rank < count), rank, mask.shape[1])  # others: additional last place
    is_sample = mask.new_zeros(len(mask), mask.shape[1] + 1).scatter(1, rank, True)
    return is_sample.gather(1, (mask.long().cumsum(dim=1) - 1).clamp(min=0))


@dataclass
class PooledGridMerging(MergingPolicy):
    """Divides the valid rectangle of a tile into as many cells as its budget, and averages the tokens of each.

    Any number of cells is supported. They form bands of equal height, and the number of cells per band differs by at
    most one. If a cell covers part of a token, the token is weighted by the covered area.
    """

    def reserve(self, budgets: Tensor, capacity: Tensor) -> Tensor:
        """Return the full budget of each tile that drops tokens, so that the selection picks none, `[tiles]`."""
        return budgets * (budgets < capacity)

    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Insert the mean of each cell at the position of the token at its center."""
        height, width = image.geometry.token_grid
        kind = torch.zeros_like(picked, dtype=torch.long)
        weights = identity_weights(picked)
        for tile, number in enumerate(reserved.tolist()):
            if not number:
                continue
            grid = candidates[tile].view(height, width)
            ys, xs = grid.any(dim=1).nonzero()[:, 0], grid.any(dim=0).nonzero()[:, 0]
            top, left, rows, cols = int(ys[0]), int(xs[0]), len(ys), len(xs)
            cells = divide_into_cells(number, rows, cols)
            cells = cells * torch.tensor([rows, cols, rows, cols]) + torch.tensor([top, left, top, left])
            centers = (cells[:, 0] + cells[:, 2]).div(2).floor() * width + (cells[:, 1] + cells[:, 3]).div(2).floor()
            indices = centers.long().to(picked.device)
            coverage = region_coverage((cells / torch.tensor([height, width, height, width])).float(), (height, width))
            coverage = coverage.to(picked.device) * candidates[tile]
            if not bool(candidates[tile, indices].all()):  # the vision tower dropped patches inside the rectangle
                indices = find_nearest_candidates(indices, candidates[tile], width)
                empty = coverage.sum(dim=1) == 0
                coverage[empty, indices[empty]] = 1.0
            kind[tile, indices] = 1
            weights[tile, indices] = coverage / coverage.sum(dim=1, keepdim=True)
        return Merged(kind, weights)


def find_nearest_candidates(indices: Tensor, candidates: Tensor, width: int) -> Tensor:
    """Return the nearest candidate of each position that no earlier position has taken, int64 `[positions]`.

    Args:
        indices: positions in a tile, `[positions]`; at most as many as candidates.
        candidates: tokens that may be kept, bool `[tokens]`.
        width: width of the token grid.
    """
    order = torch.arange(len(candidates), device=candidates.device)
    free, nearest = candidates.clone(), []
    for index in indices:
        distance = (order // width - index // width) ** 2 + (order % width - index % width) ** 2
        nearest.append(distance.masked_fill(~free, 2 * len(candidates) ** 2).argmin())
        free[nearest[-1]] = False
    return torch.stack(nearest)


def divide_into_cells(number: int, rows: int, cols: int) -> Tensor:
    """Divide a rectangle of tokens into cells of at least the size of a token, float64 `[number, 4]`.

    Args:
        number: number of cells, at most ``rows * cols``.
        rows: height of the rectangle in tokens.
        cols: width of the rectangle in tokens.

    Returns:
        (top, left, bottom, right) of each cell as fractions of the rectangle, in row-major order.
    """
    fewest_bands = -(-number // cols)
    n_bands = min(max(fewest_bands, round((number * rows / cols) ** 0.5), 1), rows, number)
    cells = []
    for band in range(n_bands):
        n_cells = number * (band + 1) // n_bands - number * band // n_bands
        for cell in range(n_cells):
            cells.append([band / n_bands, cell / n_cells, (band + 1) / n_bands, (cell + 1) / n_cells])
    return torch.tensor(cells, dtype=torch.float64)
