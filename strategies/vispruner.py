"""VisPruner: half of the budget goes to the most attended tokens, half to non-redundant tokens.

Paper: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
ICCV 2025. Repository: Theia-4869/VisPruner, commit aefa01a.

The ``int(T * r)`` tokens with the largest CLS attention are kept. The remaining tokens are sorted by attention, and
near duplicates among them are dropped in rounds of up to eight, until T tokens remain. See `important_then_diverse`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import ImportantThenDiverseSelection


@dataclass
class VisPruner(ComponentReducer):
    """Keeps the most attended tokens with half of the budget, and non-redundant tokens with the other half.

    Repaired: any budget is supported (the release fails if the number of remaining tokens is odd), and padding uses no
    budget.
    """

    published: ClassVar[str] = "ICCV 2025, arXiv 2412.01818"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=ImportantThenDiverseSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, important_share: float = 0.5) -> VisPruner:
        """Return VisPruner as published in code: it ignores unpadding and drops newline tokens.

        The release also forces a 2 x 2 tile grid. That part belongs to the processor and is not included.

        Args:
            budget: number of tokens that may enter the LLM, or their share; the release's "T per view" is
                ``Budget(T, per="tile")``.
            important_share: share of the budget for the most attended tokens (r).
        """
        allocation = UniformAllocation(rounding="floor")
        selection = ImportantThenDiverseSelection(important_share=important_share)
        return cls(budget, newlines="drop", allocation=allocation, selection=selection, padding="ignore")
