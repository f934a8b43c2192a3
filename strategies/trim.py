"""TRIM: the tokens that have most to do with the question, and the mean of the others.

Paper: Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs",
COLING 2025, arXiv 2409.10994. Repository: FreedomIntelligence/TRIM, commit f5a232d.

``p = softmax(-(tokens . text))`` with tokens and question in CLIP's shared space, neither normalized; the top share
stays, and one more token is the mean of the others, before the projector. The sign is the release's: patches that show
what the text says are less like it. The share is given, or found from outliers: ``#(p > Q3 + 1.5 IQR) / tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.image import EncodedImage
from tokenprune.policies import AllocationPolicy, MergingPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.merging import MeanOfRestMerging
from tokenprune.strategies.components.order import MergedLastOrder
from tokenprune.strategies.components.relevance import TextRelevance, TopRelevanceSelection


def outlier_share(values: Tensor) -> float:
    """Return the share of values above the third quartile plus 1.5 interquartile ranges.

    Args:
        values: any numbers; all of them count together.
    """
    flat = values.flatten().float()
    low, high = torch.quantile(flat, torch.tensor([0.25, 0.75], device=flat.device))
    return int((flat > high + 1.5 * (high - low)).sum()) / flat.numel()


@dataclass
class OutlierAllocation(AllocationPolicy):
    """As many tokens as the softmaxed scores of all tiles have outliers, whatever the budget (TRIM).

    Args:
        extra: tokens on top in every tile, for merged ones.
    """

    extra: int = 1

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Return the number of outliers per tile."""
        count = int(scores.shape[1] * outlier_share(scores.softmax(dim=1)))
        return [min(count + self.extra, room) for room in capacity]


@dataclass
class TRIM(ComponentReducer):
    """The tokens that have most to do with the question, and the mean of the others.

    Repaired: the merged token is part of the budget and stands in the image's order.
    """

    published: ClassVar[str] = "COLING 2025, arXiv 2409.10994"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(
        default_factory=lambda: TopRelevanceSelection(TextRelevance(likeness="dot")), kw_only=True
    )
    merging: MergingPolicy | None = field(default_factory=MeanOfRestMerging, kw_only=True)

    @classmethod
    def release(cls, share: float | None = None, tokens: int = 576, text_model: str | None = None) -> TRIM:
        """Return TRIM as published in code: ``int(share * tokens)`` tokens a tile and one merged token after them.

        Args:
            share: share of the tokens to keep (k); None finds it from outliers.
            tokens: tokens of a tile.
            text_model: the CLIP checkpoint that the vision tower comes from.
        """
        budget = Budget(1.0) if share is None else Budget(int(tokens * share) + 1, per="tile")
        allocation = OutlierAllocation() if share is None else UniformAllocation(rounding="floor")
        return cls(
            budget,
            newlines="drop",
            text_model=text_model,
            allocation=allocation,
            order=MergedLastOrder(),
            padding="ignore",
        )
