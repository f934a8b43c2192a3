"""Selections that were tried in the search of a strategy, see `research.strategy_search`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.policies import RelevancePolicy, SelectionPolicy, compute_relevance
from tokenprune.reducer import TokenReducer
from tokenprune.strategies.components import GlobalTopAllocation
from tokenprune.strategies.components.diversity import pairwise_cosine
from tokenprune.strategies.components.relevance import AttentionRelevance, MeanRelevance, TextRelevance, standardize
from tokenprune.strategies.question_first import QuestionFirstSelection

MODEL = "mini-pages"
"""Name of the embedded model, whose text tower reads the questions."""


@dataclass
class ImageTopAllocation(GlobalTopAllocation):
    """Ranks the tokens of all tiles in one pool; the selection reads the tiles separately."""

    pools_tiles: ClassVar[bool] = False


@dataclass
class Combined(RelevancePolicy):
    """Computes a weighted sum of the ranks of several signals.

    Args:
        parts: the signals.
        weights: weight of each signal.
    """

    parts: list[RelevancePolicy] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the parts."""
        return [signal for part in self.parts for signal in part.needs]

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the weighted sum of ranks, `[tiles, tokens]`."""
        valid = image.geometry.valid.to(image.device)
        ranks = (rank_valid(compute_relevance(part, image), valid) for part in self.parts)
        return torch.stack([w * r for w, r in zip(self.weights, ranks, strict=True)]).sum(0)


def rank_valid(values: Tensor, valid: Tensor) -> Tensor:
    """Return the rank of each valid token divided by their number, 0..1, `[tiles, tokens]`."""
    flat = values.masked_fill(~valid, -torch.inf).flatten()
    ranks = torch.empty_like(flat).scatter(0, flat.argsort(), torch.arange(len(flat), dtype=flat.dtype))
    n_invalid = (~valid).sum()
    return ((ranks - n_invalid) / valid.sum()).clamp(min=0).view_as(values)


def count_better(scores: Tensor, grid: tuple[int, int], rows: int, cols: int, features: Tensor | None = None) -> Tensor:
    """Return how many neighbors of each token have a larger score, `[tiles, tokens]`.

    Args:
        scores: one number per token, `[tiles, tokens]`.
        grid: rows and columns of the tokens of a tile.
        rows: neighbors are at most this number of rows away.
        cols: neighbors are at most this number of columns away.
        features: if given, neighbors count by their cosine similarity, `[tiles, tokens, dim]`.
    """
    height, width = grid
    plane = rearrange(scores, "tiles (height width) -> tiles height width", height=height)
    padded = F.pad(plane, (cols, cols, rows, rows), value=-torch.inf)
    total = torch.zeros_like(plane)
    if features is not None:
        unit = rearrange(F.normalize(features.float(), dim=-1), "t (h w) d -> t h w d", h=height)
        padded_unit = F.pad(unit, (0, 0, cols, cols, rows, rows))
    for down in range(2 * rows + 1):
        for right in range(2 * cols + 1):
            if (down, right) != (rows, cols):
                better = padded[:, down : down + height, right : right + width] > plane
                if features is None:
                    total += better
                else:
                    near = padded_unit[:, down : down + height, right : right + width]
                    total += better * (near * unit).sum(-1).clamp(min=0)
    return total.flatten(1)


@dataclass
class NeighborRelevance(RelevancePolicy):
    """Uses the largest value of the tokens that are near in the same row, so that the tokens of a word stay together.

    Args:
        part: the signal.
        cols: columns of the neighborhood, on each side.
    """

    part: RelevancePolicy = field(default_factory=TextRelevance)
    cols: int = 1

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the part."""
        return self.part.needs

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the largest value in each neighborhood, `[tiles, tokens]`."""
        values = compute_relevance(self.part, image)
        rows = rearrange(values, "tiles (height width) -> (tiles height) 1 width", height=image.geometry.token_grid[0])
        return F.max_pool1d(rows, 2 * self.cols + 1, stride=1, padding=self.cols).reshape(values.shape)


@dataclass
class SpreadSelection(SelectionPolicy):
    """Ranks tokens by saliency and relevance, and discounts tokens with better neighbors.

    Args:
        saliency: signal of visual saliency.
        relevance: signal of the relevance to the question; None reads no question.
        weight: weight of the relevance.
        threshold: relevance in standard deviations above which it counts.
        discount: subtracted for each better neighbor.
        rows: rows of the neighborhood, on each side.
        cols: columns of the neighborhood, on each side.
        alike: whether neighbors count by their similarity.
        base: added to the score of tokens of the base tile.
    """

    saliency: RelevancePolicy = field(default_factory=AttentionRelevance)
    relevance: RelevancePolicy | None = field(default_factory=TextRelevance)
    weight: float = 1.0
    threshold: float = 0.0
    discount: float = 0.1
    rows: int = 1
    cols: int = 1
    alike: bool = False
    base: float = 0.0

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of saliency and relevance."""
        return [*self.saliency.needs, *(self.relevance.needs if self.relevance else ())]

    def score(self, image: EncodedImage) -> Tensor:
        """Return the discounted score, `[tiles, tokens]`."""
        valid = image.geometry.valid.to(image.device)
        scores = rank_valid(compute_relevance(self.saliency, image), valid)
        if self.relevance is not None:
            values = compute_relevance(self.relevance, image)
            relevance = standardize(values.flatten()[None], valid.flatten()[None]).view_as(values)  # over all tiles
            scores = scores + self.weight * (relevance - self.threshold).clamp(min=0)
        if image.geometry.sub_images:
            scores = torch.cat([scores[:1] + self.base, scores[1:]])
        if self.discount:
            scores = scores.masked_fill(~valid, -torch.inf)
            features = image.features if self.alike else None
            better = count_better(scores, image.geometry.token_grid, self.rows, self.cols, features)
            scores = scores.masked_fill(~valid, 0) - self.discount * better
        return scores


@dataclass
class AnchoredSelection(SelectionPolicy):
    """Keeps tokens that stand out by relevance, and fills the budget with tokens that differ from the kept ones.

    Args:
        relevance: signal of the relevance to the question.
        threshold: relevance in standard deviations of an anchor.
        share: largest share of the budget for anchors.
        quality: signal that weighs the distances of the other tokens; None weighs them equally.
        power: exponent of the weights.
        fill: ``max-min`` maximizes the smallest distance to the kept tokens, ``top`` ranks by quality.
    """

    relevance: RelevancePolicy | None = field(default_factory=TextRelevance)
    threshold: float = 2.0
    share: float = 0.5
    quality: RelevancePolicy | None = None
    power: float = 1.0
    fill: str = "max-min"

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of relevance and quality."""
        parts = [part for part in (self.relevance, self.quality) if part is not None]
        return [signal for part in parts for signal in part.needs]

    def score(self, image: EncodedImage) -> Tensor:
        """Return the standardized relevance, `[tiles, tokens]`."""
        valid = image.geometry.valid.to(image.device)
        if self.relevance is None:
            return torch.zeros(valid.shape)
        return standardize(compute_relevance(self.relevance, image), valid)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep anchors, then tokens far from all kept tokens."""
        number, valid = int(budgets[0]), candidates[0]
        quality = torch.ones_like(scores)
        if self.quality is not None:
            quality = rank_valid(compute_relevance(self.quality, image), candidates) ** self.power
        order = scores[0].argsort(descending=True)
        limit = int(self.share * number)
        anchors = [int(i) for i in order[:limit] if scores[0, i] > self.threshold]
        kept = torch.zeros_like(valid)
        kept[anchors] = True
        if self.fill == "top":
            rest = quality[0].masked_fill(kept | ~valid, -torch.inf).topk(number - len(anchors)).indices
            kept[rest] = True
            return kept[None]
        distances = 1 - pairwise_cosine(image.features[0])
        weights = quality[0]
        if not anchors:
            anchors = [int((weights * distances.mean(1)).masked_fill(~valid, -1).argmax())]
            kept[anchors] = True
        nearest = distances[anchors].amin(0)
        for _ in range(number - int(kept.sum())):
            pick = int((weights * nearest).masked_fill(kept | ~valid, -torch.inf).argmax())
            kept[pick] = True
            nearest = torch.minimum(nearest, distances[pick])
        return kept[None]


@dataclass
class TopWeightSelection(QuestionFirstSelection):
    """Keeps the tokens with the largest weights of QuestionFirst, without distances between tokens."""

    pick = SelectionPolicy.pick


def anchored(**options: Any) -> ComponentReducer:
    """Return a strategy that keeps tokens of all tiles by `AnchoredSelection`."""
    return ComponentReducer(allocation=GlobalTopAllocation(), selection=AnchoredSelection(**options), text_model=MODEL)


def first_version(**options: Any) -> ComponentReducer:
    """Return the first version of QuestionFirst: anchors, then tokens by two ranks of saliency.

    The number of anchors is rounded down; in the first version it was rounded up.

    Args:
        options: other options of the selection.
    """
    mixed = Combined([AttentionRelevance(), MeanRelevance("image")], [0.5, 0.5])
    return anchored(**{"quality": mixed, "threshold": 2.5, "share": 0.5, "fill": "top", **options})


def list_candidates() -> dict[str, TokenReducer]:
    """Return the variants of QuestionFirst that are compared with all strategies, by name."""
    return {"QuestionFirst, first version": first_version()}
