"""TRIM: keeps the tokens with the largest relevance to the question, and the mean of the dropped tokens.

Paper: Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs",
COLING 2025, arXiv 2409.10994. Repository: FreedomIntelligence/TRIM, commit f5a232d.

``p = softmax(-(tokens . text))``, with unnormalized tokens and question in the shared embedding space of CLIP. The
tokens with the largest ``p`` are kept. One additional token is the mean of the dropped tokens, before the projector.
The sign is the sign of the release: patches that show the content of the text are less similar to it. The share of kept
tokens is a parameter, or the share of outliers, ``#(p > Q3 + 1.5 IQR) / tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage
from tokenprune.policies import AllocationPolicy, MergingPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.merging import MeanOfRestMerging
from tokenprune.strategies.components.order import MergedLastOrder
from tokenprune.strategies.components.relevance import TextRelevance, TopRelevanceSelection


def outlier_share(values: Tensor) -> float:
    """Return the share of values above the third quartile plus 1.5 interquartile ranges.

    Args:
        values: values of any shape; the quartiles are computed over all of them.
    """
    flat = values.flatten().float()
    low, high = torch.quantile(flat, torch.tensor([0.25, 0.75], device=flat.device))
    return int((flat > high + 1.5 * (high - low)).sum()) / flat.numel()


@dataclass
class OutlierAllocation(AllocationPolicy):
    """Grants each tile the number of outliers of the softmaxed scores, and ignores the budget (TRIM).

    Args:
        extra: number of additional tokens per tile, for merged tokens.
    """

    extra: int = 1

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Return the mean number of outliers per tile plus ``extra``, up to the capacity, `[tiles]`."""
        count = int(scores.shape[1] * outlier_share(scores.softmax(dim=1)))
        return [min(count + self.extra, limit) for limit in capacity]


@dataclass
class TRIM(ComponentReducer):
    """Keeps the tokens with the largest relevance to the question, and the mean of the dropped tokens.

    Repaired: the merged token is part of the budget and has a position in spatial order.
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
        """Return TRIM as published in code: ``int(share * tokens)`` tokens per tile, then one merged token.

        Args:
            share: share of the tokens to keep (k); None uses the share of outliers.
            tokens: number of tokens of a tile.
            text_model: CLIP checkpoint of the vision tower.
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
