"""DivPrune: keeps tokens with large distances to each other, over all tiles in one pool.

Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025,
arXiv 2503.02175. Repository: vbdi/divprune, commit 799e2d9.

Max-min diversity of projected tokens with the distance ``1 - cos``. The first pick is the token with the most distant
nearest neighbor. Each further pick maximizes the smallest distance to the picked tokens. No attention is required.

The release selects from the packed sequence, where newline tokens are candidates too, and keeps
``round(ratio * length)`` of them, half to even. Repaired: the budget counts visual tokens, and the option ``newlines``
of the reducer determines which newline tokens are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from tokenprune.budget import as_budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.geometry import NEWLINE
from tokenprune.image import EncodedImage
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.selection import Selection
from tokenprune.strategies.components.allocation import GlobalTopAllocation
from tokenprune.strategies.components.diversity import MaxMinDiversitySelection, max_min_diverse


@dataclass
class DivPrune(ComponentReducer):
    """Keeps tokens with large distances to each other, over all tiles in one pool.

    Args:
        newlines_compete: whether newline tokens compete with visual tokens for the budget, as in the release. If true,
            `selection` and `allocation` are not used.
    """

    published: ClassVar[str] = "CVPR 2025, arXiv 2503.02175"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=GlobalTopAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=MaxMinDiversitySelection, kw_only=True)
    newlines_compete: bool = field(default=False, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str = 0.098) -> DivPrune:
        """Return DivPrune as published in code: newline tokens are candidates, and ratios refer to the packed length.

        Args:
            budget: ratio of the packed length, rounded to the nearest integer, half to even, or a number of tokens.
        """
        return cls(budget, newlines_compete=True)

    def select(self, image: EncodedImage) -> Selection:
        """Select among visual tokens, or among all positions of the packed sequence."""
        if not self.newlines_compete:
            return super().select(image)
        geometry, amount = image.geometry, as_budget(self.budget).number
        packed = geometry.packed.to(image.device)
        number = min(len(packed), round(amount * len(packed)) if isinstance(amount, float) else amount)
        sequence = image.features.flatten(0, 1)[packed.clamp(min=0)]
        if image.newline is not None:
            sequence[packed == NEWLINE] = image.newline.to(sequence.dtype)
        picked = torch.zeros(len(packed), dtype=torch.bool, device=packed.device)
        picked[max_min_diverse(sequence, number)] = True
        kept = torch.zeros(geometry.tiles * geometry.tokens, dtype=torch.bool, device=packed.device)
        kept[packed[picked & (packed != NEWLINE)]] = True
        newline_mask = picked[packed == NEWLINE]
        return Selection(geometry, kept.view(geometry.tiles, geometry.tokens), number, newline_mask=newline_mask)
