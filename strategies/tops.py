"""TOPS: keeps tokens that are relevant, cover the image, and differ from each other.

Paper: Wang et al., "TOPS: First-Principles Visual Token Pruning via Constructing Token Optimal Preservation Sets for
Efficient MLLM Inference", arXiv 2606.27161. No code has been published.

The first pick is the most relevant token. Each further greedy step picks ``argmax_i  r~_i + lambda c~_i + alpha d~_i``.
The terms are relevance ``r`` (before the LLM: CLS attention), coverage ``c_i = sum_j max(0, cos_ij - m_j)`` and
diversity ``d_i = 1 - m_i``. Here ``m_j`` is the largest cosine of token ``j`` to a picked token (Eq. 6 to 9), and ``~``
rescales over the remaining tokens. Features are projected tokens, and ``alpha = lambda = 0.5`` (appendix C.2). Only the
first stage is implemented. The paper also drops tokens inside the LLM, and its first stage keeps twice the number of
tokens in its tables.

Assumptions, since the paper does not specify them: CLS attention of the feature layer, mean over heads; cosine as the
similarity; rescaling by minimum and maximum (section 4.1; its algorithm listings divide by the mean:
``rescaling="mean"``). Each tile is processed separately with an even share of the budget, and tokens stay in spatial
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.policies import AllocationPolicy, RelevancePolicy, SelectionPolicy, compute_relevance
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import ROW_CHUNK, pairwise_cosine, reads_are_fast, select_per_tile
from tokenprune.strategies.components.relevance import AttentionRelevance


def _rescale(values: Tensor, remaining: Tensor, rescaling: str) -> Tensor:
    """Rescale values by the mean or by the range of the remaining tokens, `[tokens]`."""
    if rescaling == "mean":
        mean = values.masked_fill(~remaining, 0).sum() / remaining.sum()
        return values / mean.clamp(min=1e-12)
    low = values.masked_fill(~remaining, torch.inf).amin()
    high = values.masked_fill(~remaining, -torch.inf).amax()
    return (values - low) / (high - low).clamp(min=1e-12)


def _sum_gains(similarity: Tensor, covered: Tensor) -> Tensor:
    """Return by how much each token would increase the coverage of all tokens, `[tokens]`."""
    return torch.cat([(rows - covered).relu_().sum(dim=1) for rows in similarity.split(ROW_CHUNK)])


def _update_gains(gain: Tensor, similarity: Tensor, covered: Tensor, row: Tensor) -> Tensor:
    """Return the gains after a pick, `[tokens]`, from the terms of tokens whose coverage it increases.

    The number of these tokens is read, so this is faster than `_sum_gains` only on the CPU.

    Args:
        gain: the gains before the pick, `[tokens]`.
        similarity: similarity of every pair of tokens, `[tokens, tokens]`.
        covered: largest similarity of each token to an earlier pick, `[tokens]`.
        row: similarity of each token to the pick, `[tokens]`.
    """
    improved = (row > covered).nonzero()[:, 0]
    old_coverage, new_coverage = covered[improved, None], row[improved, None]
    # Each chunk has at most as many elements as `ROW_CHUNK` rows of the similarity matrix.
    width = ROW_CHUNK * max(1, len(gain) // max(1, len(improved)))
    chunks = []
    for start in range(0, len(gain), width):
        columns = similarity[:, start : start + width].index_select(0, improved)  # columns as rows: symmetric
        lost = (columns - old_coverage).clamp_(min=0).sum(dim=0)
        chunks.append(gain[start : start + width] - lost + columns.sub_(new_coverage).clamp_(min=0).sum(dim=0))
    return torch.cat(chunks)


def optimal_preservation(
    features: Tensor, relevance: Tensor, number: int, coverage: float, diversity: float, rescaling: str = "minmax"
) -> Tensor:
    """Pick tokens greedily by relevance, coverage and diversity (arXiv 2606.27161, Alg. 1), `[number]`.

    On a CPU the coverage gains are updated: a pick changes only the terms of tokens whose coverage it increases.
    Elsewhere they are summed again, so that nothing is read from the device.

    Args:
        features: one vector per token, `[tokens, dim]`.
        relevance: relevance of each token, `[tokens]`.
        number: number of tokens to pick.
        coverage: weight of coverage (lambda).
        diversity: weight of diversity (alpha).
        rescaling: ``"minmax"`` or ``"mean"``.

    Returns:
        Token indices in the order of picking, `[number]`.
    """
    similarity, relevance = pairwise_cosine(features), relevance.float()
    covered, gain = torch.zeros_like(relevance), torch.zeros_like(relevance)
    remaining = torch.ones_like(relevance, dtype=torch.bool)
    picks = [torch.zeros_like(relevance[:0], dtype=torch.long)]
    is_updated = reads_are_fast(similarity)
    for step in range(number):
        total = _rescale(relevance, remaining, rescaling)
        if step:
            total = total + coverage * _rescale(gain, remaining, rescaling)
            total = total + diversity * _rescale(1 - covered, remaining, rescaling)
        pick = total.masked_fill(~remaining, -torch.inf).argmax(dim=0, keepdim=True)
        remaining = remaining.index_fill(0, pick, False)
        row = similarity.index_select(0, pick)[0]
        new_coverage = torch.maximum(covered, row) if step else row
        if step and is_updated:
            gain = _update_gains(gain, similarity, covered, row)
        else:
            gain = _sum_gains(similarity, new_coverage)
        covered = new_coverage
        picks.append(pick)
    return torch.cat(picks)


@dataclass
class OptimalPreservationSelection(SelectionPolicy):
    """Keeps tokens that are relevant, cover the image and differ from each other (TOPS).

    Args:
        relevance: relevance policy that scores the tokens.
        coverage: weight of coverage (lambda).
        diversity: weight of diversity (alpha).
        rescaling: how relevance, coverage and diversity are rescaled in every step: ``"minmax"`` or ``"mean"``.
    """

    relevance: RelevancePolicy = field(default_factory=AttentionRelevance)
    coverage: float = 0.5
    diversity: float = 0.5
    rescaling: Literal["minmax", "mean"] = "minmax"

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return True

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the relevance policy."""
        return self.relevance.needs

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, `[tiles, tokens]`."""
        return compute_relevance(self.relevance, image)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by the greedy algorithm of TOPS."""
        options = (self.coverage, self.diversity, self.rescaling)

        def select(tile: int, indices: Tensor, number: int) -> Tensor:
            return optimal_preservation(image.features[tile, indices], scores[tile, indices], number, *options)

        return select_per_tile(candidates, budgets, select)


@dataclass
class TOPS(ComponentReducer):
    """Keeps tokens that are relevant, cover the image and differ from each other.

    Implements the first stage of the paper, before the LLM. The module docstring lists the assumptions.
    """

    published: ClassVar[str] = "arXiv 2606.27161"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=OptimalPreservationSelection, kw_only=True)
