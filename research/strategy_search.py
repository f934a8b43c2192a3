"""Searches a strategy for dense images on training images: ``python -m research.strategy_search --name families``.

Each round compares some strategies on images of the split ``train``. `QuestionFirst` is the result; the docstrings of
the selections below describe the tried alternatives. Each image is encoded once for all settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from research.heldout import board_interval
from research.which_method import FULL, MODEL, list_projector_strategies, measure_world
from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.models.mini.boards import Split
from tokenprune.policies import RelevancePolicy, SelectionPolicy, compute_relevance
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import CDPruner, DivPrune, HiRED, QuestionFirst
from tokenprune.strategies.cdpruner import ConditionalDiversitySelection
from tokenprune.strategies.components import GlobalTopAllocation, SaliencyCoverageSelection, TopRelevanceSelection
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import pairwise_cosine
from tokenprune.strategies.components.relevance import AttentionRelevance, MeanRelevance, TextRelevance
from tokenprune.strategies.eadp import FacilityLocationSelection
from tokenprune.strategies.question_first import QuestionFirstSelection

PUBLISHED = ("HiRED", "DivPrune", "CDPruner", "TRIM", "EADP", "SCOPE", "VisPruner", "Random, seed 0")
"""Published strategies that are measured for comparison during the search."""


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


def standardize(values: Tensor, valid: Tensor) -> Tensor:
    """Return values minus their mean over valid tokens, divided by the standard deviation, `[tiles, tokens]`."""
    part = values[valid]
    return (values - part.mean()) / part.std().clamp(min=1e-9)


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
            relevance = standardize(compute_relevance(self.relevance, image), valid)
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


def spread(**options: Any) -> ComponentReducer:
    """Return a strategy that ranks the tokens of all tiles by `SpreadSelection`."""
    return ComponentReducer(allocation=ImageTopAllocation(), selection=SpreadSelection(**options), text_model=MODEL)


def chosen(**options: Any) -> ComponentReducer:
    """Return the best strategy of the first rounds with other options."""
    return spread(**{"weight": 10.0, "threshold": 2.5, "discount": 0.0, **options})


def anchored(**options: Any) -> ComponentReducer:
    """Return a strategy that keeps tokens of all tiles by `AnchoredSelection`."""
    return ComponentReducer(allocation=GlobalTopAllocation(), selection=AnchoredSelection(**options), text_model=MODEL)


def parts(**options: Any) -> QuestionFirst:
    """Return QuestionFirst with other options of its selection."""
    return QuestionFirst(text_model=MODEL, selection=QuestionFirstSelection(**options))


def pooled(selection: SelectionPolicy) -> ComponentReducer:
    """Return a published selection over the tokens of all tiles."""
    return ComponentReducer(allocation=GlobalTopAllocation(), selection=selection, text_model=MODEL)


def list_round(name: str) -> dict[str, TokenReducer]:
    """Return the settings of a round of the search by name."""
    early, deviation = AttentionRelevance(0), MeanRelevance()
    mixed = Combined([AttentionRelevance(), deviation], [0.5, 0.5])
    rounds: dict[str, dict[str, TokenReducer]] = {
        "published": {n: r for n, r in list_projector_strategies().items() if n in PUBLISHED},
        "families": {
            **{f"spread weight={w}": spread(weight=w) for w in (0.0, 0.5, 1.0, 3.0)},
            **{f"spread discount={d}": spread(weight=1.0, discount=d) for d in (0.0, 0.2, 0.4)},
            "spread alike": spread(weight=1.0, discount=0.2, alike=True),
            "spread wide": spread(weight=1.0, rows=1, cols=2),
            "spread early": spread(weight=1.0, saliency=early),
            "spread deviation": spread(weight=1.0, saliency=deviation),
            "spread mixed": spread(weight=1.0, saliency=mixed),
            "spread without base": spread(weight=1.0, base=-9.0),
            **{f"anchored share={s}": anchored(share=s) for s in (0.0, 0.3, 0.5, 0.7, 1.0)},
            **{f"anchored threshold={t}": anchored(threshold=t) for t in (1.0, 3.0)},
            "anchored attention": anchored(quality=AttentionRelevance()),
            "anchored deviation": anchored(quality=deviation),
            "anchored top": anchored(quality=AttentionRelevance(), fill="top"),
            "pooled CDPruner": pooled(ConditionalDiversitySelection()),
            "pooled TRIM": pooled(TopRelevanceSelection(TextRelevance(likeness="dot"))),
            "pooled cosine": pooled(TopRelevanceSelection()),
            "pooled EADP": pooled(FacilityLocationSelection()),
            "pooled SCOPE": pooled(SaliencyCoverageSelection()),
        },
        "thresholds": {
            **{
                f"spread threshold={t} discount={d}": spread(weight=10.0, threshold=t, discount=d)
                for t in (1.5, 2.0, 2.5, 3.0)
                for d in (0.0, 0.1, 0.2)
            },
            "anchored top": anchored(quality=AttentionRelevance(), fill="top"),
        },
        "saliency": {
            "spread deviation": spread(weight=10.0, threshold=2.0, saliency=deviation),
            "spread mixed": spread(weight=10.0, threshold=2.0, saliency=mixed),
            "spread layers": spread(weight=10.0, threshold=2.0, saliency=AttentionRelevance([-3, -2])),
            "spread early and late": spread(
                weight=10.0, threshold=2.0, saliency=Combined([early, AttentionRelevance()], [0.5, 0.5])
            ),
            "spread alike": spread(weight=10.0, threshold=2.0, alike=True),
            "spread wide": spread(weight=10.0, threshold=2.0, rows=1, cols=2),
            "spread square": spread(weight=10.0, threshold=2.0, rows=2, cols=2, discount=0.05),
            "spread row": spread(weight=10.0, threshold=2.0, rows=0, cols=2, discount=0.2),
            "spread base -0.2": spread(weight=10.0, threshold=2.0, base=-0.2),
            "spread base -0.4": spread(weight=10.0, threshold=2.0, base=-0.4),
            "spread base +0.2": spread(weight=10.0, threshold=2.0, base=0.2),
            "spread dot": spread(weight=10.0, threshold=2.0, relevance=TextRelevance(likeness="dot")),
            "pooled CDPruner": pooled(ConditionalDiversitySelection()),
        },
        "combined": {
            "attention": chosen(),
            "mixed": chosen(saliency=mixed),
            "deviation": chosen(saliency=deviation),
            **{f"base {base}": chosen(base=base) for base in (-0.1, -0.2, -0.4)},
            **{f"threshold {t}": chosen(threshold=t) for t in (2.25, 2.75)},
            "mixed, base -0.2": chosen(saliency=mixed, base=-0.2),
            "alike": chosen(alike=True, discount=0.1),
            "mixed, alike": chosen(saliency=mixed, alike=True, discount=0.1),
        },
        "fill": {
            "max-min": anchored(threshold=2.5, share=1.0),
            "max-min by attention": anchored(threshold=2.5, share=1.0, quality=AttentionRelevance()),
            "max-min by mixed": anchored(threshold=2.5, share=1.0, quality=mixed),
            "max-min by squared mixed": anchored(threshold=2.5, share=1.0, quality=mixed, power=2.0),
            "top mixed, half": anchored(threshold=2.5, share=0.5, quality=mixed, fill="top"),
            "max-min by mixed, half": anchored(threshold=2.0, share=0.5, quality=mixed),
            "dot": chosen(relevance=TextRelevance(likeness="dot")),
            "CDPruner, pooled": pooled(ConditionalDiversitySelection()),
            "DivPrune": DivPrune(),
        },
        "weights": {
            **{
                f"attention {w}": chosen(saliency=Combined([AttentionRelevance(), deviation], [w, 1 - w]))
                for w in (0.3, 0.5, 0.7)
            },
            "image deviation": chosen(saliency=Combined([AttentionRelevance(), MeanRelevance("image")], [0.5, 0.5])),
            "mixed, threshold 2": chosen(saliency=mixed, threshold=2.0),
            "mixed, threshold 3": chosen(saliency=mixed, threshold=3.0),
            "mixed, alike": chosen(saliency=mixed, alike=True, discount=0.1),
            "mixed, no question": replace(chosen(saliency=mixed, relevance=None), text_model=None),
            "DivPrune": DivPrune(),
            "HiRED": HiRED(),
            "pooled CDPruner": pooled(ConditionalDiversitySelection()),
            "CDPruner": CDPruner(text_model=MODEL),
        },
        "parts": {
            "QuestionFirst": QuestionFirst(text_model=MODEL),
            "without anchors": parts(threshold=1e9),
            "anchors without limit": parts(share=1.0),
            "attention only": parts(deviation=AttentionRelevance()),
            "deviation only": parts(attention=MeanRelevance()),
            "equal budgets per tile": QuestionFirst(text_model=MODEL, allocation=UniformAllocation()),
            "threshold 2": parts(threshold=2.0),
            "threshold 3": parts(threshold=3.0),
            "HiRED": HiRED(),
            "DivPrune": DivPrune(),
        },
        "anchors": {
            **{
                f"top mixed, share {s}, threshold {t}": anchored(threshold=t, share=s, quality=mixed, fill="top")
                for s, t in ((0.5, 2.5), (0.5, 3.0), (0.3, 2.5), (0.3, 3.0))
            },
            **{
                f"max-min by mixed, share {s}, threshold {t}": anchored(threshold=t, share=s, quality=mixed)
                for s, t in ((0.5, 2.5), (0.3, 2.5))
            },
        },
    }
    return rounds[name]


def list_candidates() -> dict[str, TokenReducer]:
    """Return the final candidates that are no strategy of the library by name."""
    mixed = Combined([AttentionRelevance(), MeanRelevance("image")], [0.5, 0.5])
    return {"QuestionFirst, max-min fill": anchored(threshold=2.5, share=0.5, quality=mixed)}


def main(
    name: str = "families",
    world: str = "pages",
    number: int = 20,
    first: int = 0,
    averages: tuple[float, ...] = (0.05, 0.1),
    split: Split = "train",
) -> None:
    """Measure a round of the search and print right answers in percent with intervals, and coverage, best first.

    Args:
        name: name of the round.
        world: ``boards`` or ``pages``.
        number: number of images.
        first: index of the first image.
        averages: average tokens as ratios.
        split: ``train``; ``heldout`` only for the ablation of the final strategy.
    """
    settings = {
        f"{average} {key}": replace(reducer, budget=Budget(average, of="unpadded"))
        for average in averages
        for key, reducer in list_round(name).items()
    }
    results = measure_world(world, settings, number, first, split)

    def cell(key: str) -> str:
        return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in board_interval(results.answers_of(key))))

    print(f"{sum(map(len, results.questions))} questions, all tokens {cell(FULL)}")
    for average in averages:
        keys = [key for key in settings if key.startswith(f"{average} ")]
        for key in sorted(keys, key=lambda key: -np.concatenate(results.right[key]).mean()):
            print(f"{cell(key)}  coverage {100 * np.concatenate(results.coverage[key]).mean():.1f}  {key}")


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
