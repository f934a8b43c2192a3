"""SCOPE: keeps salient tokens that together cover the image.

Paper: Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", NeurIPS 2025.
Repository: kinredon/SCOPE, commit 6bf7306.

Each greedy step picks ``argmax_j  (sum over heads of CLS attention_j)^alpha * sum_i max(0, cos(x_i, x_j) - m_i)``. It
then raises ``m_i`` to the similarity with the pick, if this is larger. ``x`` are the features before the projector.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import SaliencyCoverageSelection


@dataclass
class SCOPE(ComponentReducer):
    """Keeps salient tokens that together are similar to all tokens.

    Repaired: the coverage ignores padding, and padding uses no budget.
    """

    published: ClassVar[str] = "NeurIPS 2025, arXiv 2510.24214"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=SaliencyCoverageSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, alpha: float = 1.0) -> SCOPE:
        """Return SCOPE as published in code: ``total // tiles`` tokens per tile, no unpadding, no newline tokens.

        Args:
            budget: number of tokens that may enter the LLM, or their share.
            alpha: exponent of the saliency.
        """
        allocation, selection = UniformAllocation(rounding="floor"), SaliencyCoverageSelection(alpha=alpha)
        return cls(budget, newlines="drop", allocation=allocation, selection=selection, padding="ignore")
