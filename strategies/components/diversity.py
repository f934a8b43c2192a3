"""Selection policies that weigh tokens against each other: diversity, coverage, de-duplication, neighborhoods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import SelectionPolicy
from tokenprune.selection import top_per_tile

ROWS = 64
"""Rows of a similarity matrix that a greedy step copies at a time."""


def cosines(features: Tensor) -> Tensor:
    """Return the cosine similarity of every pair of tokens, 0 for vectors without direction, `[tokens, tokens]`.

    Args:
        features: one vector per token, `[tokens, dim]`.
    """
    unit = F.normalize(features.float(), dim=-1)
    return unit @ unit.T


def max_min_diverse(features: Tensor, number: int) -> Tensor:
    """Pick tokens greedily so that each is as far as possible from those already picked (DivPrune).

    Distance is one minus cosine. The first pick is the token whose nearest other token is farthest away.

    Args:
        features: one vector per token, `[tokens, dim]`.
        number: tokens to pick.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    if not number:
        return torch.empty(0, dtype=torch.long, device=features.device)
    apart = cosines(features).neg_().add_(1)
    # The smallest distance of a token is the one to itself; the second smallest decides the first pick.
    picks = [int(apart.topk(min(2, len(apart)), dim=1, largest=False)[0][:, -1].argmax())]
    distance = torch.full_like(apart[0], torch.inf)
    while len(picks) < number:
        distance = torch.minimum(distance, apart[picks[-1]])
        distance[picks[-1]] = -torch.inf  # among equal tokens, rounding must not pick one twice
        picks.append(int(distance.argmax()))
    return torch.tensor(picks, device=features.device)


def lazy_coverage(
    similarity: Tensor, number: int, saliency: Tensor | None = None, weights: Tensor | None = None, batch: int = 16
) -> Tensor:
    """Pick tokens greedily by the similarity that they add to what is covered, without looking at all each time.

    The gain of token ``u`` is ``saliency_u * sum_i weights_i * max(0, similarity_ui - m_i)``, where ``m_i`` is the
    largest similarity of token ``i`` to a picked one so far, 0 at first. It only falls as ``m`` grows, rounding
    included, because every gain is summed in the same order. So an old gain is an upper bound, and a token whose fresh
    gain is above all others, old or fresh, is the pick of the plain greedy, ties included.

    Args:
        similarity: of every pair of tokens, `[tokens, tokens]`.
        number: tokens to pick.
        saliency: weight of each token as a pick, `[tokens]`; 1 if left out.
        weights: weight of each token as one to cover, not negative, `[tokens]`; 1 if left out.
        batch: tokens whose gains are computed first after a pick; more follow in growing numbers.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    covered = similarity.new_zeros(len(similarity))

    def some_gains(rows: Tensor) -> Tensor:
        added = similarity.index_select(0, rows).sub_(covered).clamp_(min=0)  # few rows: faster than indexing
        total = (added if weights is None else added.mul_(weights)).sum(dim=1)
        return total if saliency is None else saliency[rows] * total

    def gain(rows: Tensor) -> Tensor:
        return torch.cat([some_gains(part) for part in rows.split(ROWS)])

    order = torch.arange(len(similarity), device=similarity.device)
    bound = gain(order)
    seen, fresh = len(order), torch.ones_like(bound, dtype=torch.bool)
    picked = torch.zeros_like(fresh)
    picks: list[int] = []
    while len(picks) < number:
        best = int(bound.argmax())
        if not fresh[best]:
            stale = order[seen : 2 * seen + batch]
            bound[stale], fresh[stale] = gain(stale), True
            seen += len(stale)
            continue
        picks.append(best)
        picked[best] = True
        covered = torch.maximum(covered, similarity[best])
        # A negative gain, of a token of negative saliency, may rise to 0.
        bound = bound.clamp(min=0).masked_fill_(picked, -torch.inf)
        order = bound.argsort(descending=True, stable=True)[: len(bound) - len(picks)]
        seen, fresh = 0, picked.clone()
    return torch.tensor(picks, dtype=torch.long, device=similarity.device)


def saliency_coverage(features: Tensor, saliency: Tensor, number: int) -> Tensor:
    """Pick tokens greedily by how much similarity they add to the set, weighted by their saliency (SCOPE).

    The gain of token ``j`` is ``saliency_j * sum_i max(0, cos_ij - m_i)``, where ``m_i`` is the largest similarity of
    token ``i`` to a picked one so far, 0 at first.

    Args:
        features: one vector per token, `[tokens, dim]`.
        saliency: weight of each token, `[tokens]`.
        number: tokens to pick.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    return lazy_coverage(cosines(features), number, saliency=saliency.float())


def facility_location(features: Tensor, weights: Tensor, number: int) -> Tensor:
    """Pick tokens greedily so that each token, by its weight, is similar to one that is picked.

    The gain of token ``u`` is ``sum_j weights_j * max(0, s_uj - m_j)`` with ``s = (1 + cos) / 2``, where ``m_j`` is the
    largest similarity of token ``j`` to a picked one so far, 0 at first.

    Args:
        features: one vector per token, `[tokens, dim]`.
        weights: how much it matters that a token is covered, `[tokens]`; negative ones count as 0.
        number: tokens to pick.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    return lazy_coverage(cosines(features).add_(1).div_(2), number, weights=weights.float().clamp(min=0))


def determinantal(features: Tensor, relevance: Tensor, number: int, tolerance: float = 1e-5) -> Tensor:
    """Pick relevant tokens that span a large volume: greedy MAP inference of a DPP (Chen et al., arXiv 1709.05135).

    The kernel is ``L_ij = relevance_i * relevance_j * cos_ij``; each pick has the largest variance in ``L`` that the
    picks before it leave. Tokens that add nothing to those picked follow when no others are left, most relevant first.

    Args:
        features: one vector per token, `[tokens, dim]`.
        relevance: how much each token matters, `[tokens]`.
        number: tokens to pick.
        tolerance: share of a token's variance below which the rest is rounding.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    similarity = cosines(features)
    # Relevance only scales rows and columns, so the Cholesky steps run on the cosines: there one tolerance fits all.
    variance, quality = similarity.diagonal().clone(), relevance.float().square()
    factors = similarity.new_zeros(number, len(similarity))
    picked = torch.zeros_like(variance, dtype=torch.bool)
    picks: list[int] = []
    while len(picks) < number:
        worth = (quality * variance).masked_fill_(picked | (variance <= tolerance), 0)
        best = int(worth.argmax())
        if not worth[best] > 0:
            rest = relevance.masked_fill(picked, -torch.inf).argsort(descending=True, stable=True)
            picks += rest[: number - len(picks)].tolist()
            break
        done = factors[: len(picks)]
        step = (similarity[best] - done[:, best] @ done) / variance[best].sqrt()
        variance -= step.square()
        factors[len(picks)] = step
        picked[best] = True
        picks.append(best)
    return torch.tensor(picks, dtype=torch.long, device=features.device)


def important_then_diverse(features: Tensor, scores: Tensor, number: int, important: int, step: int = 8) -> Tensor:
    """Keep the most important tokens, then thin out near duplicates among the rest (VisPruner).

    The rest stays in order of importance. Round by round it is split into even and odd places; the even tokens that are
    most similar to any odd one are dropped, at most ``step`` a round. Survivors go on as even tokens by falling
    similarity, then odd ones, which decides the next split.

    Args:
        features: one vector per token, `[tokens, dim]`.
        scores: importance, `[tokens]`.
        number: tokens to keep.
        important: how many of them are kept for their importance alone.
        step: most tokens that a round drops.

    Returns:
        Indices of kept tokens, important ones first, `[number]`.
    """
    order = scores.argsort(descending=True, stable=True)
    first, rest = order[:important], order[important:]
    diverse = number - important
    similarity = cosines(features) if diverse and len(rest) > diverse else None
    while similarity is not None and len(rest) > diverse:
        even, odd = rest[0::2], rest[1::2]
        # Barring columns is exact and faster than taking a part of them; a few rows at a time stay in the cache.
        barred = torch.full_like(similarity[0], -torch.inf).index_fill_(0, odd, 0)
        parts = [similarity.index_select(0, rows).add_(barred).amax(dim=1) for rows in even.split(ROWS)]
        likeness = torch.cat(parts)
        drop = min(step, len(rest) - diverse, len(even))
        rest = torch.cat([even[likeness.argsort(descending=True, stable=True)][drop:], odd])
    return torch.cat([first, rest[:diverse]])


def neighbors(anchors: Tensor, token_grid: tuple[int, int], wrap: bool) -> Tensor:
    """Return the four neighbors of tokens.

    Args:
        anchors: token indices, `[anchors]`.
        token_grid: height x width of the tokens.
        wrap: step along the flat sequence and clamp to its ends, as HiPrune's release does; a step at the end of a row
            then lands in the next one. Else neighbors outside the grid are left out.

    Returns:
        Token indices, sorted and without repeats.
    """
    height, width = token_grid
    if wrap:
        around = torch.cat([anchors - 1, anchors + 1, anchors - width, anchors + width]).clamp(0, height * width - 1)
    else:
        row, col = anchors // width, anchors % width
        parts = [(anchors - 1, col > 0), (anchors + 1, col < width - 1)]
        parts += [(anchors - width, row > 0), (anchors + width, row < height - 1)]
        around = torch.cat([beside[inside] for beside, inside in parts])
    found = torch.zeros(height * width, dtype=torch.bool, device=anchors.device)
    found[around] = True
    return found.nonzero()[:, 0]


def in_each_tile(candidates: Tensor, budgets: Tensor, choose: Callable[[int, Tensor, int], Tensor]) -> Tensor:
    """Choose tokens tile by tile.

    Args:
        candidates: tokens that may be kept, bool `[tiles, tokens]`.
        budgets: tokens to keep in each tile, `[tiles]`.
        choose: from tile, indices of its candidates and budget to places among these candidates.

    Returns:
        Kept tokens, bool `[tiles, tokens]`.
    """
    kept = torch.zeros_like(candidates)
    for tile, budget in enumerate(budgets.tolist()):
        places = candidates[tile].nonzero()[:, 0]
        if budget:
            kept[tile, places[choose(tile, places, budget)]] = True
    return kept


@dataclass
class MaxMinDiversitySelection(SelectionPolicy):
    """Keep tokens that are far from each other (DivPrune); needs no attention."""

    def score(self, image: EncodedImage) -> Tensor:
        """Return the same score for every token: only distances matter, `[tiles, tokens]`."""
        return image.features.new_zeros(image.features.shape[:2])

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy max-min distance of the features."""
        return in_each_tile(candidates, budgets, lambda t, at, n: max_min_diverse(image.features[t, at], n))


@dataclass
class SaliencyCoverageSelection(SelectionPolicy):
    """Keep salient tokens that cover what the others look like (SCOPE).

    Args:
        layer: layer of the vision tower whose CLS attention and features are read.
        alpha: power of the saliency; 0 is coverage alone.
    """

    layer: LayerChoice = "feature"
    alpha: float = 1.0

    @property
    def needs(self) -> Sequence[Signal]:
        """CLS attention and features before the projector."""
        return (Signal("cls_attention", self.layer), Signal("vision_features", self.layer))

    def score(self, image: EncodedImage) -> Tensor:
        """Return the saliency, `[tiles, tokens]`."""
        return image.cls_attention(self.layer).sum(dim=1) ** self.alpha

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy saliency-weighted coverage."""
        features = image.vision_features(self.layer)
        return in_each_tile(candidates, budgets, lambda t, at, n: saliency_coverage(features[t, at], scores[t, at], n))


@dataclass
class ImportantThenDiverseSelection(SelectionPolicy):
    """Keep the most attended tokens, and of the rest those that repeat nothing (VisPruner).

    Args:
        layer: layer of the vision tower whose CLS attention and features are read.
        important_share: share of the budget for attention alone.
    """

    layer: LayerChoice = "feature"
    important_share: float = 0.5

    @property
    def needs(self) -> Sequence[Signal]:
        """CLS attention and features before the projector."""
        return (Signal("cls_attention", self.layer), Signal("vision_features", self.layer))

    def score(self, image: EncodedImage) -> Tensor:
        """Return CLS attention, mean over heads, `[tiles, tokens]`."""
        return image.cls_attention(self.layer).mean(dim=1)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep important tokens, then diverse ones."""
        features = image.vision_features(self.layer)

        def choose(tile: int, places: Tensor, number: int) -> Tensor:
            important = int(number * self.important_share)
            return important_then_diverse(features[tile, places], scores[tile, places], number, important)

        return in_each_tile(candidates, budgets, choose)


@dataclass
class AnchorBufferRegisterSelection(SelectionPolicy):
    """Keep tokens that a middle layer attends to, their neighbors, and tokens that a deep layer attends to (HiPrune).

    Args:
        object_layer: the middle layer, whose received attention finds objects.
        layer: the deep layer, whose received attention finds global information.
        anchor_share: share of the budget for anchors and their neighbors (alpha).
        wrap: let neighbors run over the ends of rows, as the release does.
    """

    object_layer: LayerChoice = 0.35
    layer: LayerChoice = "feature"
    anchor_share: float = 0.1
    wrap: bool = False

    @property
    def needs(self) -> Sequence[Signal]:
        """Received attention of both layers."""
        return (Signal("received_attention", self.object_layer), Signal("received_attention", self.layer))

    def score(self, image: EncodedImage) -> Tensor:
        """Return what the deep layer attends to, mean over heads and queries, `[tiles, tokens]`."""
        return image.received_attention(self.layer).mean(dim=1)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep anchors, then their neighbors, then the tokens with the largest scores."""
        objects = image.received_attention(self.object_layer).mean(dim=1).masked_fill(~candidates, -torch.inf)
        order = objects.argsort(dim=1, descending=True, stable=True)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        for own, places, budget in zip(rank, order, budgets.tolist(), strict=True):
            anchors = places[: round(budget * self.anchor_share / 5)]
            # Anchors rank before their neighbors, and these before everything else.
            own[neighbors(anchors, image.geometry.token_grid, self.wrap)] -= candidates.shape[1]
            own[anchors] -= 2 * candidates.shape[1]
        return top_per_tile(-rank, budgets, candidates)
