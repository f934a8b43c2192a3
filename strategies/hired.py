"""HiRED: attention-guided token dropping within a fixed budget, before the LLM and without training.

Paper: Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language
Models", AAAI 2025, arXiv 2408.10945. Repository: hasanar1f/HiRED, commit 502d6dd.

The CLS attention of the first ViT layer over the base tile measures the visual content of each sub-image. It divides
the budget over the sub-images (Alg. 1, Eq. 1). The CLS attention of the feature layer ranks the tokens inside each tile
(Eq. 2). For an image of one tile (LLaVA-1.5), only Eq. 2 applies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import VisualContentAllocation
from tokenprune.strategies.components.selection import TopAttentionSelection


@dataclass
class HiRED(ComponentReducer):
    """Divides the budget over the tiles by early CLS attention, and selects tokens by late CLS attention.

    Repaired: sub-images map to their exact regions, visual content is the sum of the attention, and the budget is spent
    exactly, on valid tokens only.
    """

    published: ClassVar[str] = "AAAI 2025, arXiv 2408.10945"
    parity: ClassVar[str] = "release(): 12/12 official cases"

    allocation: AllocationPolicy = field(default_factory=VisualContentAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=TopAttentionSelection, kw_only=True)

    @classmethod
    def paper(cls, budget: int | float | str | Budget = 0.2, base_share: float = 0.5) -> HiRED:
        """Return HiRED by the equations of the paper: even quadrants, attention sums, tile budgets rounded down.

        The paper does not mention padding. Its budget includes padding tokens, which the model then removes.

        Args:
            budget: number of tokens that may enter the LLM, or their share.
            base_share: share of the budget for the base tile (alpha), 0.0 to 1.0.
        """
        allocation = VisualContentAllocation(base_share, region="quadrant", rounding="floor")
        return cls(budget, allocation=allocation, padding="ignore")

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, base_share: float = 0.5) -> HiRED:
        """Return HiRED as published in code, including its defects.

        Sub-images map to horizontal stripes of the base tile, and visual content is a count of top tokens. Tile budgets
        are rounded down and not redistributed, padding uses budget, and newline tokens are dropped.

        Args:
            budget: number of tokens that may enter the LLM, or their share.
            base_share: share of the budget for the base tile (alpha), 0.0 to 1.0.
        """
        allocation = VisualContentAllocation(base_share, region="stripe", statistic="top_count", rounding="floor")
        return cls(budget, newlines="drop", allocation=allocation, padding="ignore")
