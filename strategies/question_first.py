"""QuestionFirst: keeps tokens that stand out for the question, and fills the budget with salient tokens of all tiles.

A strategy of this library, without a paper, see docs/explanation/question-first.md. All tiles share one budget. A token
is an *anchor* if its relevance exceeds the mean of the image by more than ``threshold`` standard deviations. At most a
``share`` of the budget goes to anchors, the most relevant first. All other tokens are ranked by two ranks in the image:
by the CLS attention, and by the negative cosine of a token and the mean token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.budget import check_share
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.policies import AllocationPolicy, RelevancePolicy, SelectionPolicy, compute_relevance
from tokenprune.selection import top_ranked
from tokenprune.strategies.components.allocation import GlobalTopAllocation
from tokenprune.strategies.components.relevance import AttentionRelevance, MeanRelevance, TextRelevance


@dataclass
class QuestionFirstSelection(SelectionPolicy):
    """Keeps tokens that stand out for the question, then tokens that are salient by two signals.

    Args:
        relevance: relevance of tokens to the question.
        attention: first signal of saliency.
        deviation: second signal of saliency.
        threshold: relevance of an anchor, in standard deviations above the mean of the tokens.
        share: largest share of the budget for anchors, from 0 to 1.
    """

    relevance: RelevancePolicy = field(default_factory=TextRelevance)
    attention: RelevancePolicy = field(default_factory=AttentionRelevance)
    deviation: RelevancePolicy = field(default_factory=MeanRelevance)
    threshold: float = 2.5
    share: float = 0.5

    def __post_init__(self) -> None:
        """Check the options when the component is created."""
        super().__post_init__()
        check_share("share", self.share)

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the three policies."""
        return [signal for part in (self.relevance, self.attention, self.deviation) for signal in part.needs]

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return True

    def score(self, image: EncodedImage) -> Tensor:
        """Return the mean of the ranks by attention and deviation, 0 to 1, `[tiles, tokens]`."""
        signals = (compute_relevance(part, image) for part in (self.attention, self.deviation))
        first, second = (signal.argsort(dim=1).argsort(dim=1) for signal in signals)
        return (first + second) / (2 * image.geometry.tokens)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep anchors up to their share, then the candidates with the largest scores."""
        relevance, count = compute_relevance(self.relevance, image), candidates.sum(dim=1, keepdim=True).clamp(min=1)
        centered = (relevance - (relevance * candidates).sum(dim=1, keepdim=True) / count) * candidates
        spread = (centered.square().sum(dim=1, keepdim=True) / count).sqrt()
        is_anchor = candidates & (centered > self.threshold * spread)
        rank = centered.masked_fill(~is_anchor, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
        is_anchor &= rank < self.share * budgets[:, None]
        return top_ranked(scores + 2.0 * is_anchor, budgets) & candidates


@dataclass
class QuestionFirst(ComponentReducer):
    """Keeps tokens that stand out for the question, and fills the budget with salient tokens of all tiles."""

    allocation: AllocationPolicy = field(default_factory=GlobalTopAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=QuestionFirstSelection, kw_only=True)
