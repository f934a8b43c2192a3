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
from tokenprune.strategies.components.selection import sample_mask

RELEASE_WEIGHTS = "release"
"""Option value that selects the weights of the published code."""


def find_representatives(scores: Tensor, dropped: Tensor, reserved: Tensor) -> Tensor:
    """Return the dropped token with the largest score of each tile with a reserved token, bool `[tiles, tokens]`.

    Its position receives the merged token.

    Args:
        scores: scores of the tokens, `[tiles, tokens]`.
        dropped: dropped tokens, bool `[tiles, tokens]`.
        reserved: number of reserved tokens, `[tiles]`.
    """
    finite = scores.clamp(min=torch.finfo(scores.dtype).min)
    index = finite.masked_fill(~dropped, -torch.inf).argmax(dim=1, keepdim=True)
    is_largest = torch.arange(scores.shape[1], device=scores.device) == index
    return is_largest & dropped & (reserved > 0)[:, None]


@dataclass
class MeanOfRestMerging(MergingPolicy):
    """Adds one token per tile, the mean of its dropped tokens (TRIM)."""

    before_projector: ClassVar[bool] = True

    @property
    def is_exact(self) -> bool:
        """Whether every tile gets its reserved number of merged tokens."""
        return True

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
        dropped = candidates & ~picked
        is_merged = find_representatives(scores, dropped, reserved)
        mean = dropped / dropped.sum(dim=1, keepdim=True).clamp(min=1)
        weights = torch.where(is_merged[..., None], mean[:, None], identity_weights(picked))
        return Merged(is_merged.long(), weights)


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
    def is_exact(self) -> bool:
        """Whether every tile gets its reserved number of merged tokens."""
        return True

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
        identity = identity_weights(picked)
        similarity = (keys @ keys.mT).masked_fill(~candidates[:, None] | (identity > 0), -torch.inf)
        likeness, nearest = similarity.topk(min(self.neighbors, keys.shape[1]), dim=2)
        added = attention[:, None].expand_as(similarity).gather(2, nearest).masked_fill(likeness == -torch.inf, 0)
        dropped = candidates & ~picked
        rest = attention * dropped
        rows = identity.scatter_add(2, nearest, added)
        if self.weights == "mean":
            rows = rows / rows.sum(dim=2, keepdim=True)
            total = rest.sum(dim=1, keepdim=True)  # if no dropped token draws attention, all have the same weight
            rest = torch.where(total > 0, rest / total, dropped / dropped.sum(dim=1, keepdim=True).clamp(min=1))
        is_merged = find_representatives(scores, dropped, reserved)
        weights = torch.where(picked[..., None], rows, identity)
        return Merged(is_merged.long(), torch.where(is_merged[..., None], rest[:, None], weights))


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
        is_target = sample_mask(dropped, number, self.spacing)
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


@dataclass
class PooledGridMerging(MergingPolicy):
    """Divides the valid rectangle of a tile into as many cells as its budget, and averages the tokens of each.

    Any number of cells is supported. They form bands of equal height, and the number of cells per band differs by at
    most one. If a cell covers part of a token, the token is weighted by the covered area.
    """

    @property
    def is_exact(self) -> bool:
        """Whether every tile gets its reserved number of merged tokens."""
        return True

    def reserve(self, budgets: Tensor, capacity: Tensor) -> Tensor:
        """Return the full budget of each tile that drops tokens, so that the selection picks none, `[tiles]`."""
        return budgets * (budgets < capacity)

    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Insert the mean of each cell at the position of the token at its center."""
        (height, width), device = image.geometry.token_grid, picked.device
        candidates = candidates.cpu()  # cells depend on layout and budgets only, so they are computed on the host
        kind = torch.zeros_like(candidates, dtype=torch.long)
        weights = identity_weights(candidates)
        for tile, number in enumerate(reserved.tolist()):
            if not number:
                continue
            grid = candidates[tile].view(height, width)
            ys, xs = grid.any(dim=1).nonzero()[:, 0], grid.any(dim=0).nonzero()[:, 0]
            top, left, rows, cols = int(ys[0]), int(xs[0]), len(ys), len(xs)
            cells = divide_into_cells(number, rows, cols)
            cells = cells * torch.tensor([rows, cols, rows, cols]) + torch.tensor([top, left, top, left])
            centers = (cells[:, 0] + cells[:, 2]).div(2).floor() * width + (cells[:, 1] + cells[:, 3]).div(2).floor()
            indices = centers.long()
            coverage = region_coverage((cells / torch.tensor([height, width, height, width])).float(), (height, width))
            coverage = coverage * candidates[tile]
            if not bool(candidates[tile, indices].all()):  # the vision tower dropped patches inside the rectangle
                indices = find_nearest_candidates(indices, candidates[tile], width)
                empty = coverage.sum(dim=1) == 0
                coverage[empty, indices[empty]] = 1.0
            kind[tile, indices] = 1
            weights[tile, indices] = coverage / coverage.sum(dim=1, keepdim=True)
        return Merged(kind.to(device), weights.to(device))


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
