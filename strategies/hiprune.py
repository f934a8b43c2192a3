"""HiPrune: keeps object tokens of a middle layer with their neighbors, and global tokens of a deep layer.

Paper: Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
AAAI 2026. Repository: Danielement321/HiPrune, commit 6e83a12.

``c_l`` is the received attention in layer l (mean over heads and queries), and T is the budget of a tile. The
``round(T * alpha / 5)`` tokens with the largest ``c_object`` are anchors, and their four neighbors are buffers. The
remaining tokens with the largest ``c_deep`` are registers, which fill the budget up to T. The object layer is the 9th
of the 24 layers of CLIP-L.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import AnchorBufferRegisterSelection


@dataclass
class HiPrune(ComponentReducer):
    """Keeps object tokens of a middle layer with their neighbors, and global tokens of a deep layer.

    Repaired: neighbors stay inside the grid, padding uses no budget, and the budget is spent exactly.
    """

    published: ClassVar[str] = "arXiv 2508.00553"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=AnchorBufferRegisterSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, alpha: float = 0.1) -> HiPrune:
        """Return HiPrune as published in code: neighbors wrap around the ends of rows.

        Each tile keeps ``int(total / tiles)`` tokens.

        Args:
            budget: number of tokens that may enter the LLM, or their share.
            alpha: share of the budget for anchors and buffers.
        """
        selection = AnchorBufferRegisterSelection(object_layer=8, anchor_share=alpha, wrap=True)
        allocation = UniformAllocation(rounding="floor")
        return cls(budget, newlines="drop", allocation=allocation, selection=selection, padding="ignore")
