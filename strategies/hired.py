"""HiRED: attention-guided token dropping within a fixed budget, before the LLM and without training.

Paper: Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language
Models", AAAI 2025, arXiv 2408.10945. Repository: hasanar1f/HiRED, commit 502d6dd.

CLS attention of the first ViT layer over the base tile says how much content each part of the image has; it divides the
budget over the sub-images (Alg. 1, Eq. 1). CLS attention of the final feature layer ranks the tokens inside each tile
(Eq. 2). An image of a single tile (LLaVA-1.5) spends its whole budget by Eq. 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import VisualContentAllocation
from tokenprune.strategies.components.selection import TopAttentionSelection


@dataclass
class HiRED(ComponentReducer):
    """Early CLS attention divides the budget over the tiles, late CLS attention picks the tokens.

    Repaired: true regions, attention mass, and a budget that is spent exactly on tokens that survive.
    """

    published: ClassVar[str] = "AAAI 2025, arXiv 2408.10945"
    parity: ClassVar[str] = "release(): 12/12 official cases"

    allocation: AllocationPolicy = field(default_factory=VisualContentAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=TopAttentionSelection, kw_only=True)

    @classmethod
    def paper(cls, budget: int | float | str | Budget = 0.2, base_share: float = 0.5) -> HiRED:
        """Return HiRED by the paper's equations: even quadrants, attention mass, each tile's budget rounded down.

        The paper does not speak of padding: its budget counts padding tokens, which the model then removes.

        Args:
            budget: tokens that may enter the LLM.
            base_share: share of the base tile (alpha).
        """
        allocation = VisualContentAllocation(base_share, region="quadrant", rounding="floor")
        return cls(budget, allocation=allocation, padding="ignore")

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, base_share: float = 0.5) -> HiRED:
        """Return HiRED as published in code, defects included.

        Sub-images are matched with horizontal stripes of the base tile, content is a count of top tokens, budgets are
        rounded down and never redistributed, padding is paid for, and newline tokens are dropped.

        Args:
            budget: tokens that may enter the LLM.
            base_share: share of the base tile (alpha).
        """
        allocation = VisualContentAllocation(base_share, region="stripe", statistic="top_count", rounding="floor")
        return cls(budget, newlines="drop", allocation=allocation, padding="ignore")
