"""FasterVLM: keeps the tokens with the largest CLS attention, the same number in every tile.

Paper: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference
Faster", arXiv 2412.01818. Repository: Theia-4869/FasterVLM, commit f5d5f12.

``score = mean over heads of CLS attention in the feature layer``. The top T tokens of each tile are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.selection import TopAttentionSelection


@dataclass
class FasterVLM(ComponentReducer):
    """Keeps the tokens with the largest CLS attention, the same number in every tile.

    Repaired: padding uses no budget, and the newline tokens of kept rows are kept.
    """

    published: ClassVar[str] = "arXiv 2412.01818v1"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=TopAttentionSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2) -> FasterVLM:
        """Return FasterVLM as published in code: it ignores unpadding and drops newline tokens.

        The release also replaces LLaVA-NeXT's choice of the tile grid. That part belongs to the processor and is not
        included.

        Args:
            budget: number of tokens that may enter the LLM, or their share; the release's "T per view" is
                ``Budget(T, per="tile")``.
        """
        return cls(budget, newlines="drop", allocation=UniformAllocation(rounding="floor"), padding="ignore")
