"""QuestionFirst: keeps tokens that differ from each other, and prefers tokens near those relevant to the question.

A strategy of this library, without a paper, see docs/explanation/question-first.md. Each pick has the largest product
of its weight and its smallest distance to the picked tokens (DivPrune, if all weights are equal). The weight is a power
of the rank of the saliency, plus the relevance above a threshold, of the token or of a more relevant neighbor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.policies import AllocationPolicy, RelevancePolicy, SelectionPolicy, compute_relevance
from tokenprune.strategies.components.allocation import GlobalTopAllocation
from tokenprune.strategies.components.diversity import MaxMinDiversitySelection, keep_max_min_diverse
from tokenprune.strategies.components.relevance import AttentionRelevance, TextRelevance, standardize


@dataclass
class QuestionFirstSelection(MaxMinDiversitySelection):
    """Keeps tokens with large distances to each other, weighted by saliency and relevance to the question.

    Args:
        relevance: relevance of tokens to the question.
        saliency: saliency of tokens.
        neighbors: number of neighbors on each side, in the order of the tokens, whose relevance counts for a token.
        threshold: smallest relevance that counts, in standard deviations above the mean of the tokens.
        weight: weight of the relevance.
        power: exponent of the rank of the saliency; 0 ignores the saliency.
    """

    relevance: RelevancePolicy = field(default_factory=TextRelevance)
    saliency: RelevancePolicy = field(default_factory=AttentionRelevance)
    neighbors: int = 1
    threshold: float = 1.0
    weight: float = 2.0
    power: float = 0.5

    def __post_init__(self) -> None:
        """Check the options when the component is created."""
        super().__post_init__()
        for name, kind in (("neighbors", int), ("threshold", float), ("weight", float), ("power", float)):
            value = getattr(self, name)
            if not (0 <= value < math.inf and value == kind(value)):
                raise ValueError(f"{name}={value!r} must be a finite {'whole ' * (kind is int)}number, 0 or larger")

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of both policies."""
        return (*self.relevance.needs, *self.saliency.needs)

    def score(self, image: EncodedImage) -> Tensor:
        """Return the weight of each token, `[tiles, tokens]`."""
        valid = image.geometry.valid.to(image.device)
        signals = (compute_relevance(part, image).float() for part in (self.saliency, self.relevance))
        saliency, relevance = (signal.masked_fill(~valid, -torch.inf) for signal in signals)
        ranks = saliency.argsort(dim=1, stable=True).argsort(dim=1) + 1 - (~valid).sum(dim=1, keepdim=True)
        share = (ranks / valid.sum(dim=1, keepdim=True).clamp(min=1)).clamp(min=0)
        largest = F.max_pool1d(relevance[:, None], 2 * self.neighbors + 1, stride=1, padding=self.neighbors)[:, 0]
        return share**self.power + self.weight * (standardize(largest, valid) - self.threshold).clamp(min=0)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy max-min distance of the features, multiplied by the scores."""
        return keep_max_min_diverse(image.features, budgets, candidates, scores)


@dataclass
class QuestionFirst(ComponentReducer):
    """Keeps tokens with large distances to each other, and prefers tokens near those relevant to the question."""

    allocation: AllocationPolicy = field(default_factory=GlobalTopAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=QuestionFirstSelection, kw_only=True)
