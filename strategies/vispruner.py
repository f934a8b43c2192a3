"""VisPruner: half of the budget for attention, half for tokens that repeat nothing.

Paper: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
ICCV 2025. Repository: Theia-4869/VisPruner, commit aefa01a.

``int(T * r)`` tokens with the largest CLS attention stay; among the others, ordered by attention, near duplicates are
dropped in rounds of up to eight until T is reached; see `important_then_diverse`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import ImportantThenDiverseSelection


@dataclass
class VisPruner(ComponentReducer):
    """Half of the budget for attention, half for tokens that repeat nothing.

    Repaired: any budget works (the release fails on odd rests), and padding is never paid for.
    """

    published: ClassVar[str] = "ICCV 2025, arXiv 2412.01818"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=ImportantThenDiverseSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, important_share: float = 0.5) -> VisPruner:
        """Return VisPruner as published in code: no unpadding in mind, no newlines.

        The release also forces a 2 x 2 tile grid; that is the processor's business, not done here.

        Args:
            budget: tokens that may enter the LLM; the release's "T per view" is ``Budget(T, per="tile")``.
            important_share: share of the budget for attention alone (r).
        """
        allocation = UniformAllocation(rounding="floor")
        selection = ImportantThenDiverseSelection(important_share=important_share)
        return cls(budget, newlines="drop", allocation=allocation, selection=selection, padding="ignore")
