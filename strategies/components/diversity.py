"""Selection policies that compare tokens with each other: diversity, coverage, de-duplication, neighborhoods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.budget import check_share, read_numbers
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import SelectionPolicy
from tokenprune.selection import count_rows, top_per_tile, top_ranked, true_indices

ROW_CHUNK = 64
"""Number of rows of a similarity matrix that a greedy step copies at a time."""


def reads_are_fast(tensor: Tensor) -> bool:
    """Return whether the host can read values without a wait, and outside of a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def pairwise_cosine(features: Tensor) -> Tensor:
    """Return the cosine similarity of every pair of tokens, float32 `[tokens, tokens]`; 0 for zero vectors.

    Args:
        features: one vector per token, `[tokens, dim]`.
    """
    unit = F.normalize(features.float(), dim=-1)
    return unit @ unit.T


def mark_picks(picks: Tensor, tokens: int) -> Tensor:
    """Return the mask of picked tokens, bool `[tokens]`.

    Args:
        picks: token indices, `[picks]`.
        tokens: number of tokens.
    """
    return picks.new_zeros(tokens, dtype=torch.bool).scatter(0, picks, torch.ones_like(picks, dtype=torch.bool))


def max_min_diverse(
    features: Tensor, number: int, candidates: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Pick tokens greedily by their smallest distance to the picked tokens (DivPrune), `[number]`.

    The distance is one minus the cosine similarity. The first pick is the token with the most distant nearest neighbor.
    If there are weights, each pick has the largest product of its weight and its distance. The picks stay on the
    device, so the host does not wait for each of them.

    Args:
        features: one vector per token, `[tokens, dim]`.
        number: number of tokens to pick.
        candidates: tokens that may be picked, bool `[tokens]`; None means all tokens.
        weights: weight of each token, `[tokens]`; None means equal weights. A weight below the smallest positive
            number counts as this number.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    if not number:
        return torch.empty(0, dtype=torch.long, device=features.device)
    distances = pairwise_cosine(features).neg_().add_(1)
    nearest = torch.full_like(distances[:1], torch.inf)
    if candidates is not None:
        nearest = nearest.masked_fill(~candidates, -torch.inf)
        distances = distances.masked_fill(~candidates, torch.inf)
    # The smallest distance of a token is the distance to itself, so the second smallest determines the first pick.
    isolation = distances.topk(min(2, len(distances)), dim=1, largest=False)[0][:, -1]
    if weights is not None:  # the product with the smallest distance is the smallest product, for positive weights
        weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)
        isolation, distances = weights * isolation, weights * distances
    pick = torch.minimum(isolation, nearest).argmax(dim=1)
    # A pick is never picked again, although rounding can make it the most distant of several equal tokens.
    is_self = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    distances = distances.masked_fill(is_self, -torch.inf)
    picks = [pick]
    while len(picks) < number:
        nearest = torch.minimum(nearest, distances.index_select(0, pick))
        pick = nearest.argmax(dim=1)
        picks.append(pick)
    return torch.cat(picks)


def keep_max_min_diverse(
    features: Tensor, budgets: Tensor, candidates: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Apply `max_min_diverse` to each tile and return the mask of kept tokens, bool `[tiles, tokens]`.

    Args:
        features: one vector per token, `[tiles, tokens, dim]`.
        budgets: number of tokens to keep in each tile, `[tiles]`.
        candidates: tokens that may be kept, bool `[tiles, tokens]`.
        weights: weight of each token, `[tiles, tokens]`; None means equal weights.
    """
    kept = []
    for tile, number in enumerate(read_numbers(budgets)):
        weight = None if weights is None else weights[tile]
        picks = max_min_diverse(features[tile], number, candidates[tile], weight)
        kept.append(mark_picks(picks, candidates.shape[1]))
    return torch.stack(kept)


def greedy_coverage(
    similarity: Tensor, number: int, saliency: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Pick tokens greedily by their gain in coverage, `[number]`; nothing is read from the device.

    The gain of token ``u`` is ``saliency_u * sum_i weights_i * max(0, similarity_ui - m_i)``. Here ``m_i`` is the
    largest similarity of token ``i`` to a picked token, 0 before the first pick.

    Args:
        similarity: similarity of every pair of tokens, `[tokens, tokens]`.
        number: number of tokens to pick.
        saliency: weight of each token as a pick, `[tokens]`; 1 by default.
        weights: weight of each token as a covered token, not negative, `[tokens]`; 1 by default.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    covered, picked = torch.zeros_like(similarity[0]), torch.zeros_like(similarity[0], dtype=torch.bool)
    picks = [covered.new_zeros(0, dtype=torch.long)]
    for _ in range(number):
        added = (similarity - covered).relu()
        gain = (added if weights is None else added * weights).sum(dim=1)
        gain = gain if saliency is None else saliency * gain
        pick = gain.masked_fill(picked, -torch.inf).argmax(dim=0, keepdim=True)
        picked = picked.index_fill(0, pick, True)
        covered = torch.maximum(covered, similarity.index_select(0, pick)[0])
        picks.append(pick)
    return torch.cat(picks)


def lazy_coverage(
    similarity: Tensor, number: int, saliency: Tensor | None = None, weights: Tensor | None = None, batch: int = 16
) -> Tensor:
    """Pick the tokens of `greedy_coverage`, `[number]`, and recompute only the gains that can win.

    Each step reads from the device, so this is faster only on the CPU. A gain never grows as the coverage grows,
    rounding included, because every gain is summed in the same order. So a gain from an earlier step is an upper bound.
    If the recomputed gain of a token is the largest of all gains, then the token is the pick of the plain greedy
    algorithm, ties included.

    Args:
        similarity: similarity of every pair of tokens, `[tokens, tokens]`.
        number: number of tokens to pick.
        saliency: weight of each token as a pick, `[tokens]`; 1 by default.
        weights: weight of each token as a covered token, not negative, `[tokens]`; 1 by default.
        batch: number of gains that are recomputed first after a pick. The number grows with each further batch.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    covered = similarity.new_zeros(len(similarity))

    def chunk_gain(rows: Tensor) -> Tensor:
        added = similarity.index_select(0, rows).sub_(covered).relu_()  # faster than indexing for few rows
        total = (added if weights is None else added.mul_(weights)).sum(dim=1)
        return total if saliency is None else saliency[rows] * total

    def compute_gain(rows: Tensor) -> Tensor:
        return torch.cat([chunk_gain(chunk) for chunk in rows.split(ROW_CHUNK)])

    order = torch.arange(len(similarity), device=similarity.device)
    bound = compute_gain(order)
    n_updated, is_current = len(order), torch.ones_like(bound, dtype=torch.bool)
    picked = torch.zeros_like(is_current)
    picks: list[int] = []
    while len(picks) < number:
        best = int(bound.argmax())
        if not is_current[best]:
            stale = order[n_updated : 2 * n_updated + batch]
            bound[stale], is_current[stale] = compute_gain(stale), True
            n_updated += len(stale)
            continue
        picks.append(best)
        picked[best] = True
        covered = torch.maximum(covered, similarity[best])
        # If the saliency of a token is negative, its negative gain can rise to 0.
        bound = bound.clamp(min=0).masked_fill_(picked, -torch.inf)
        order = bound.argsort(descending=True, stable=True)[: len(bound) - len(picks)]
        n_updated, is_current = 0, picked.clone()
    return torch.tensor(picks, dtype=torch.long, device=similarity.device)


def _cover(similarity: Tensor, number: int, **options: Tensor) -> Tensor:
    """Return the picks of the function that is faster on the device of the similarity, `[number]`."""
    return (lazy_coverage if reads_are_fast(similarity) else greedy_coverage)(similarity, number, **options)


def saliency_coverage(features: Tensor, saliency: Tensor, number: int) -> Tensor:
    """Pick tokens greedily by their gain in coverage, weighted by saliency (SCOPE), `[number]`.

    The gain of token ``j`` is ``saliency_j * sum_i max(0, cos_ij - m_i)``. Here ``m_i`` is the largest similarity of
    token ``i`` to a picked token, 0 before the first pick.

    Args:
        features: one vector per token, `[tokens, dim]`.
        saliency: weight of each token, `[tokens]`.
        number: number of tokens to pick.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    return _cover(pairwise_cosine(features), number, saliency=saliency.float())


def facility_location(features: Tensor, weights: Tensor, number: int) -> Tensor:
    """Pick tokens that represent all tokens, by greedy weighted facility location, `[number]`.

    The gain of token ``u`` is ``sum_j weights_j * max(0, s_uj - m_j)`` with ``s = (1 + cos) / 2``. Here ``m_j`` is the
    largest similarity of token ``j`` to a picked token, 0 before the first pick.

    Args:
        features: one vector per token, `[tokens, dim]`.
        weights: weight of each token as a covered token, `[tokens]`; negative weights count as 0.
        number: number of tokens to pick.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    return _cover(pairwise_cosine(features).add_(1).div_(2), number, weights=weights.float().clamp(min=0))


def greedy_dpp(features: Tensor, relevance: Tensor, number: int, tolerance: float = 1e-5) -> Tensor:
    """Pick relevant, mutually different tokens, `[number]`, by greedy MAP inference of a determinantal point process.

    Algorithm of Chen et al., arXiv 1709.05135. The kernel is ``L_ij = relevance_i * relevance_j * cos_ij``. Each pick
    has the largest variance in ``L``, conditioned on the earlier picks. If no token with a variance remains, the most
    relevant remaining tokens follow.

    Args:
        features: one vector per token, `[tokens, dim]`.
        relevance: relevance of each token, `[tokens]`.
        number: number of tokens to pick.
        tolerance: share of the variance of a token below which the remaining variance counts as a rounding error.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    similarity = pairwise_cosine(features)
    # Relevance only scales rows and columns, so the Cholesky steps run on the cosines. The
    # same tolerance fits all tokens there.
    quality = relevance.float().square()
    variance = similarity.diagonal().masked_fill(quality == 0, 0)
    # Tokens without gain follow by relevance: their score is the negative rank, and -inf after the pick.
    fallback = -1.0 - relevance.argsort(descending=True, stable=True).argsort()
    factors = similarity.new_zeros(number, len(similarity))
    picks = [torch.zeros_like(variance[:0], dtype=torch.long)]
    for step in range(number):
        has_gain = variance > tolerance
        pick = torch.where(has_gain, quality * variance, fallback).argmax(dim=0, keepdim=True)
        spread = torch.where(has_gain, variance, torch.inf).index_select(0, pick).sqrt()
        row, earlier_factors = similarity.index_select(0, pick)[0], factors[:step]
        factor = (row - earlier_factors.index_select(1, pick)[:, 0] @ earlier_factors) / spread
        variance = (variance - factor.square()).index_fill(0, pick, 0)
        factors[step] = factor
        fallback = fallback.index_fill(0, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks)


def important_then_diverse(features: Tensor, scores: Tensor, number: int, important: int, step: int = 8) -> Tensor:
    """Keep the most important tokens, and drop near duplicates among the remaining tokens (VisPruner), `[number]`.

    The remaining tokens are sorted by importance. Each round splits them into even and odd positions. It drops the even
    tokens that are most similar to any odd token, at most ``step`` per round. The next round gets the even tokens by
    descending similarity, followed by the odd tokens. This order determines its split.

    Args:
        features: one vector per token, `[tokens, dim]`.
        scores: importance of each token, `[tokens]`.
        number: number of tokens to keep.
        important: number of tokens that are kept only for their importance.
        step: largest number of tokens that a round drops.

    Returns:
        Indices of kept tokens, important ones first, `[number]`.
    """
    order = scores.argsort(descending=True, stable=True)
    most_important, remaining = order[:important], order[important:]
    n_diverse = number - important
    similarity = pairwise_cosine(features) if n_diverse and len(remaining) > n_diverse else None
    while similarity is not None and len(remaining) > n_diverse:
        even, odd = remaining[0::2], remaining[1::2]
        # Masking columns is exact and faster than selecting them. The chunks of rows fit into the CPU cache.
        column_mask = torch.full_like(similarity[0], -torch.inf).index_fill_(0, odd, 0)
        chunks = [similarity.index_select(0, rows).add_(column_mask).amax(dim=1) for rows in even.split(ROW_CHUNK)]
        largest = torch.cat(chunks)
        n_dropped = min(step, len(remaining) - n_diverse, len(even))
        remaining = torch.cat([even[largest.argsort(descending=True, stable=True)][n_dropped:], odd])
    return torch.cat([most_important, remaining[:n_diverse]])


def find_neighbors(is_anchor: Tensor, token_grid: tuple[int, int], wrap: bool) -> Tensor:
    """Return the direct neighbors (left, right, above, below) of the anchors, bool `[tiles, tokens]`.

    Args:
        is_anchor: the anchors, bool `[tiles, tokens]`.
        token_grid: height x width of the tokens.
        wrap: whether neighbors wrap around to the next or previous row, as in HiPrune's release: steps follow the flat
            sequence and are clamped to its ends. Otherwise, neighbors outside the grid are omitted.
    """
    (height, width), last = token_grid, is_anchor.shape[1] - 1
    index = torch.arange(last + 1, device=is_anchor.device)
    row, col = index // width, index % width
    steps = {-1: col > 0, 1: col < width - 1, -width: row > 0, width: row < height - 1}
    counts = torch.zeros(len(is_anchor), last + 2, dtype=torch.long, device=is_anchor.device)
    for step, is_inside in steps.items():
        # The additional last entry counts the neighbors outside the grid.
        target = (index + step).clamp(0, last) if wrap else torch.where(is_inside, index + step, last + 1)
        counts = counts.scatter_add(1, target.expand_as(is_anchor), is_anchor.long())
    return counts[:, :-1] > 0


def select_per_tile(candidates: Tensor, budgets: Tensor, select: Callable[[int, Tensor, int], Tensor]) -> Tensor:
    """Apply a selection function to each tile and return the mask of kept tokens, bool `[tiles, tokens]`.

    Args:
        candidates: tokens that may be kept, bool `[tiles, tokens]`.
        budgets: number of tokens to keep in each tile, `[tiles]`.
        select: function of tile index, token indices of its candidates `[candidates]` and budget. It returns positions
            in this list of candidates, `[budget]`.
    """
    kept = []
    for tile, (budget, number) in enumerate(zip(read_numbers(budgets), count_rows(candidates), strict=True)):
        picks = candidates.new_zeros(0, dtype=torch.long)
        if budget:
            indices = true_indices(candidates[tile], number)
            picks = indices[select(tile, indices, budget)]
        kept.append(mark_picks(picks, candidates.shape[1]))
    return torch.stack(kept)


@dataclass
class MaxMinDiversitySelection(SelectionPolicy):
    """Keeps tokens with large distances to each other (DivPrune). Requires no attention."""

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return True

    def score(self, image: EncodedImage) -> Tensor:
        """Return zeros, `[tiles, tokens]`, because the selection depends only on distances."""
        return image.features.new_zeros(image.features.shape[:2])

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy max-min distance of the features."""
        return keep_max_min_diverse(image.features, budgets, candidates)


@dataclass
class SaliencyCoverageSelection(SelectionPolicy):
    """Keeps salient tokens that together are similar to all tokens (SCOPE).

    Args:
        layer: layer of the vision tower whose CLS attention and features are read.
        alpha: exponent of the saliency; 0 ignores the saliency.
    """

    layer: LayerChoice = "feature"
    alpha: float = 1.0

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return True

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention, and the features before the projector."""
        return (Signal("cls_attention", self.layer), Signal("vision_features", self.layer))

    def score(self, image: EncodedImage) -> Tensor:
        """Return the saliency, `[tiles, tokens]`."""
        return image.cls_attention(self.layer).sum(dim=1) ** self.alpha

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy saliency-weighted coverage."""
        features = image.vision_features(self.layer)
        return select_per_tile(
            candidates,
            budgets,
            lambda tile, indices, number: saliency_coverage(features[tile, indices], scores[tile, indices], number),
        )


@dataclass
class ImportantThenDiverseSelection(SelectionPolicy):
    """Keeps the most attended tokens, and non-redundant tokens among the remaining ones (VisPruner).

    Args:
        layer: layer of the vision tower whose CLS attention and features are read.
        important_share: share of the budget for the most attended tokens.
    """

    layer: LayerChoice = "feature"
    important_share: float = 0.5

    def __post_init__(self) -> None:
        """Check the options when the component is created."""
        super().__post_init__()
        check_share("important_share", self.important_share)

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return True

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention, and the features before the projector."""
        return (Signal("cls_attention", self.layer), Signal("vision_features", self.layer))

    def score(self, image: EncodedImage) -> Tensor:
        """Return CLS attention, mean over heads, `[tiles, tokens]`."""
        return image.cls_attention(self.layer).mean(dim=1)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep important tokens, then diverse tokens."""
        features = image.vision_features(self.layer)

        def select(tile: int, indices: Tensor, number: int) -> Tensor:
            important = int(number * self.important_share)
            return important_then_diverse(features[tile, indices], scores[tile, indices], number, important)

        return select_per_tile(candidates, budgets, select)


@dataclass
class AnchorBufferRegisterSelection(SelectionPolicy):
    """Keeps the most attended tokens of a middle layer with their neighbors, then of a deep layer (HiPrune).

    Args:
        object_layer: the middle layer. Its received attention is large at objects.
        layer: the deep layer. Its received attention is large at tokens with global information.
        anchor_share: share of the budget for anchors and their neighbors (alpha).
        wrap: whether neighbors wrap around the ends of rows, as in the release.
    """

    object_layer: LayerChoice = 0.35
    layer: LayerChoice = "feature"
    anchor_share: float = 0.1
    wrap: bool = False

    def __post_init__(self) -> None:
        """Check the options when the component is created."""
        super().__post_init__()
        check_share("anchor_share", self.anchor_share)

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return True

    @property
    def needs(self) -> Sequence[Signal]:
        """The received attention of both layers."""
        return (Signal("received_attention", self.object_layer), Signal("received_attention", self.layer))

    def score(self, image: EncodedImage) -> Tensor:
        """Return the received attention of the deep layer, mean over heads and queries, `[tiles, tokens]`."""
        return image.received_attention(self.layer).mean(dim=1)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep anchors, then their neighbors, then the tokens with the largest scores."""
        objects = image.received_attention(self.object_layer).mean(dim=1).masked_fill(~candidates, -torch.inf)
        is_anchor = top_ranked(objects, (budgets.double() * self.anchor_share / 5).round())
        is_neighbor = find_neighbors(is_anchor, image.geometry.token_grid, self.wrap)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # Anchors rank before their neighbors, and the neighbors before all remaining tokens.
        rank = rank - candidates.shape[1] * (is_neighbor + 2 * is_anchor.long())
        return top_per_tile(-rank, budgets, candidates)
