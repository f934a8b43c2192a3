"""TOPS: tokens that are relevant, cover the others, and differ from each other.

Paper: Wang et al., "TOPS: First-Principles Visual Token Pruning via Constructing Token Optimal Preservation Sets for
Efficient MLLM Inference", arXiv 2606.27161. No code has been published.

Greedy, beginning with the most relevant token: pick ``argmax_i  r~_i + lambda c~_i + alpha d~_i`` with relevance ``r``
(before the LLM: CLS attention), coverage ``c_i = sum_j max(0, cos_ij - m_j)``, diversity ``d_i = 1 - m_i``, where
``m_j`` is the largest cosine of token ``j`` to a picked one (Eq. 6 to 9); ``~`` rescales over the tokens left.
Features are projected tokens; ``alpha = lambda = 0.5`` (appendix C.2). Only this first stage is here: the paper goes on
dropping inside the LLM and gives this stage twice the tokens that its tables name.

Assumed, since the paper does not say: CLS attention of the feature layer, mean over heads; cosine as the similarity;
rescaling by minimum and maximum (section 4.1; its algorithm listings divide by the mean: ``rescaling="mean"``); each
tile for itself with an even share of the budget; the image's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.image import EncodedImage, Signal
from tokenprune.policies import AllocationPolicy, RelevancePolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import ROWS, cosines, in_each_tile
from tokenprune.strategies.components.relevance import AttentionRelevance


def _rescaled(values: Tensor, open_: Tensor, how: str) -> Tensor:
    known = values[open_]
    if how == "mean":
        return values / known.mean().clamp(min=1e-12)
    low, high = known.aminmax()
    return (values - low) / (high - low).clamp(min=1e-12)


def optimal_preservation(
    features: Tensor, relevance: Tensor, number: int, coverage: float, diversity: float, rescaling: str = "minmax"
) -> Tensor:
    """Pick tokens greedily by relevance, coverage and diversity (arXiv 2606.27161, Alg. 1).

    Coverage is kept up to date: a pick changes it only through the tokens that it covers better than those before.

    Args:
        features: one vector per token, `[tokens, dim]`.
        relevance: how much each token matters, `[tokens]`.
        number: tokens to pick.
        coverage: weight of coverage (lambda).
        diversity: weight of diversity (alpha).
        rescaling: ``"minmax"`` or ``"mean"``.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    similarity, relevance = cosines(features), relevance.float()
    covered, gain = torch.zeros_like(relevance), torch.zeros_like(relevance)
    left = torch.ones_like(relevance, dtype=torch.bool)
    picks: list[int] = []
    while len(picks) < number:
        worth = _rescaled(relevance, left, rescaling)
        if picks:
            worth = worth + coverage * _rescaled(gain, left, rescaling)
            worth = worth + diversity * _rescaled(1 - covered, left, rescaling)
        picks.append(int(worth.masked_fill(~left, -torch.inf).argmax()))
        left[picks[-1]] = False
        row = similarity[picks[-1]]
        if len(picks) == 1:
            covered = row.clone()
            gain = torch.cat([(rows - row).clamp_(min=0).sum(dim=1) for rows in similarity.split(ROWS)])
            continue
        better = (row > covered).nonzero()[:, 0]
        before, now = covered[better, None], row[better, None]
        width = ROWS * max(1, len(gain) // max(1, len(better)))  # no more than `ROWS` rows of the matrix at a time
        for start in range(0, len(gain), width):
            columns = similarity[:, start : start + width].index_select(0, better)  # for rows: it is symmetric
            part = gain[start : start + width]
            part -= (columns - before).clamp_(min=0).sum(dim=0)
            part += columns.sub_(now).clamp_(min=0).sum(dim=0)
        covered = torch.maximum(covered, row)
    return torch.tensor(picks, dtype=torch.long, device=features.device)


@dataclass
class OptimalPreservationSelection(SelectionPolicy):
    """Keep tokens that are relevant, cover the others and differ from each other (TOPS).

    Args:
        relevance: how much each token matters.
        coverage: weight of coverage (lambda).
        diversity: weight of diversity (alpha).
        rescaling: how the three are made comparable in every step: ``"minmax"`` or ``"mean"``.
    """

    relevance: RelevancePolicy = field(default_factory=AttentionRelevance)
    coverage: float = 0.5
    diversity: float = 0.5
    rescaling: Literal["minmax", "mean"] = "minmax"

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the relevance."""
        return self.relevance.needs

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, `[tiles, tokens]`."""
        return self.relevance.relevance(image)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by the greedy of TOPS."""
        weights = (self.coverage, self.diversity, self.rescaling)

        def choose(tile: int, places: Tensor, number: int) -> Tensor:
            return optimal_preservation(image.features[tile, places], scores[tile, places], number, *weights)

        return in_each_tile(candidates, budgets, choose)


@dataclass
class TOPS(ComponentReducer):
    """Tokens that are relevant, cover the others and differ from each other.

    The first stage of the paper, before the LLM; see the module for what was assumed.
    """

    published: ClassVar[str] = "arXiv 2606.27161"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=OptimalPreservationSelection, kw_only=True)
