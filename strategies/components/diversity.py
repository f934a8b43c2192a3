"""Selection policies that weigh tokens against each other: diversity, coverage, de-duplication, neighbourhoods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.components import SelectionPolicy
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice


def max_min_diverse(features: Tensor, number: int) -> Tensor:
    """Pick tokens greedily so that each is as far as possible from those already picked (DivPrune).

    Distance is one minus cosine. The first pick is the token whose nearest other token is farthest away.

    Args:
        features: one vector per token, `[tokens, dim]`.
        number: tokens to pick.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    unit = F.normalize(features.float(), dim=-1)
    if not number:
        return torch.empty(0, dtype=torch.long, device=features.device)
    # The smallest distance of a token is the one to itself; the second smallest decides the first pick.
    nearest = torch.cat(
        [(1 - part @ unit.T).topk(min(2, len(unit)), dim=1, largest=False)[0] for part in unit.split(512)]
    )
    picks = [int(nearest[:, -1].argmax())]
    distance = torch.full_like(unit[:, 0], torch.inf)
    while len(picks) < number:
        distance = torch.minimum(distance, 1 - unit @ unit[picks[-1]])
        distance[picks[-1]] = -torch.inf  # among equal tokens, rounding must not pick one twice
        picks.append(int(distance.argmax()))
    return torch.tensor(picks, device=features.device)


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
    unit = F.normalize(features.float(), dim=-1)
    similarity = unit @ unit.T
    covered = similarity.new_zeros(len(unit))
    free = torch.ones_like(covered, dtype=torch.bool)
    picks = []
    for _ in range(number):
        gain = saliency.float() * (similarity - covered).clamp(min=0).sum(dim=1)
        picks.append(int(gain.masked_fill(~free, -torch.inf).argmax()))
        free[picks[-1]] = False
        covered = torch.maximum(covered, similarity[picks[-1]])
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
    unit = F.normalize(features.float(), dim=-1)
    order = scores.argsort(descending=True, stable=True)
    first, rest = order[:important], order[important:]
    diverse = number - important
    while diverse and len(rest) > diverse:
        even, odd = rest[0::2], rest[1::2]
        likeness = (unit[even] @ unit[odd].T).amax(dim=1)
        drop = min(step, len(rest) - diverse, len(even))
        rest = torch.cat([even[likeness.argsort(descending=True, stable=True)][drop:], odd])
    return torch.cat([first, rest[:diverse]])


def neighbours(anchors: Tensor, token_grid: tuple[int, int], wrap: bool) -> Tensor:
    """Return the four neighbours of tokens.

    Args:
        anchors: token indices, `[anchors]`.
        token_grid: height x width of the tokens.
        wrap: step along the flat sequence and clamp to its ends, as HiPrune's release does; a step at the end of a row
            then lands in the next one. Else neighbours outside the grid are left out.

    Returns:
        Token indices, sorted and without repeats.
    """
    height, width = token_grid
    if wrap:
        steps = torch.tensor([-1, 1, -width, width], device=anchors.device)
        around: Tensor = torch.unique((anchors[:, None] + steps).clamp(0, height * width - 1))
        return around
    row, col = anchors // width, anchors % width
    steps = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]], device=anchors.device)
    rows, cols = (row[:, None] + steps[:, 0]).flatten(), (col[:, None] + steps[:, 1]).flatten()
    inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    beside: Tensor = torch.unique((rows * width + cols)[inside])
    return beside


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
class MaxMinDiversity(SelectionPolicy):
    """Keep tokens that are far from each other (DivPrune); needs no attention."""

    def score(self, image: EncodedImage) -> Tensor:
        """Return the same score for every token: only distances matter, `[tiles, tokens]`."""
        return image.features.new_zeros(image.features.shape[:2])

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy max-min distance of the features."""
        return in_each_tile(candidates, budgets, lambda t, at, n: max_min_diverse(image.features[t, at], n))


@dataclass
class SaliencyCoverage(SelectionPolicy):
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
class ImportantThenDiverse(SelectionPolicy):
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
class AnchorsBuffersRegisters(SelectionPolicy):
    """Keep tokens that a middle layer attends to, their neighbours, and tokens that a deep layer attends to (HiPrune).

    Args:
        object_layer: the middle layer, whose received attention finds objects.
        layer: the deep layer, whose received attention finds global information.
        anchor_share: share of the budget for anchors and their neighbours (alpha).
        wrap: let neighbours run over the ends of rows, as the release does.
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
        """Keep anchors, then their neighbours, then the tokens with the largest scores."""
        objects = image.received_attention(self.object_layer).mean(dim=1).masked_fill(~candidates, -torch.inf)
        kept = torch.zeros_like(candidates)
        for tile, budget in enumerate(budgets.tolist()):
            anchors = objects[tile].argsort(descending=True, stable=True)[: round(budget * self.anchor_share / 5)]
            # Anchors rank before their neighbours, and these before everything else.
            rank = scores[tile].argsort(descending=True, stable=True).argsort()
            rank[neighbours(anchors, image.geometry.token_grid, self.wrap)] -= candidates.shape[1]
            rank[anchors] -= 2 * candidates.shape[1]
            allowed = candidates[tile].nonzero()[:, 0]
            kept[tile, allowed[rank[allowed].argsort()[:budget]]] = True
        return kept
