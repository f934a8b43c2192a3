"""HiPrune: objects from a middle layer with their surroundings, and global tokens from a deep layer.

Paper: Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
AAAI 2026. Repository: Danielement321/HiPrune, commit 6e83a12.

With ``c_l`` the attention received in layer l (mean over heads and queries) and T tokens for a tile: the
``round(T * alpha / 5)`` largest of ``c_object`` are anchors, their four neighbors are buffers, and the largest of
``c_deep`` among the others, the registers, fill up to T. The object layer is the 9th of CLIP-L's 24.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import AnchorBufferRegisterSelection


@dataclass
class HiPrune(ComponentReducer):
    """Objects of a middle layer with their neighbors, and global tokens of a deep layer.

    Repaired: neighbors stay inside the grid, padding is never paid for, the budget is spent exactly.
    """

    published: ClassVar[str] = "arXiv 2508.00553"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=AnchorBufferRegisterSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, alpha: float = 0.1) -> HiPrune:
        """Return HiPrune as published in code: neighbors wrap around rows, ``int(total / tiles)`` tokens a tile.

        Args:
            budget: tokens that may enter the LLM.
            alpha: share of anchors and buffers.
        """
        selection = AnchorBufferRegisterSelection(object_layer=8, anchor_share=alpha, wrap=True)
        allocation = UniformAllocation(rounding="floor")
        return cls(budget, newlines="drop", allocation=allocation, selection=selection, padding="ignore")
