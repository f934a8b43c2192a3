"""DivPrune: tokens that are as different from each other as possible, in one pool.

Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025,
arXiv 2503.02175. Repository: vbdi/divprune, commit 799e2d9.

Max-min diversity on projected tokens with distance ``1 - cos``: the first pick is the token whose nearest neighbor is
farthest, each next one maximizes the smallest distance to those picked. No attention is needed.

The release works on the packed sequence, where newline tokens are candidates like all others, and keeps
``round(ratio * length)`` of them, half to even. Repaired: the budget is for visual tokens, and newlines follow the
reducer's own option.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from tokenprune.budget import as_budget
from tokenprune.image import NEWLINE, EncodedImage
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.selection import Selection
from tokenprune.strategies.components.allocation import GlobalTopAllocation
from tokenprune.strategies.components.diversity import MaxMinDiversitySelection, max_min_diverse


@dataclass
class DivPrune(ComponentReducer):
    """Tokens as far from each other as possible, over all tiles in one pool.

    Args:
        newlines_compete: let newline tokens compete with visual tokens for the budget, as the release does; selection
            and allocation are not asked then.
    """

    published: ClassVar[str] = "CVPR 2025, arXiv 2503.02175"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=GlobalTopAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=MaxMinDiversitySelection, kw_only=True)
    newlines_compete: bool = field(default=False, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str = 0.098) -> DivPrune:
        """Return DivPrune as published in code: newlines are candidates, and a ratio is one of the packed length.

        Args:
            budget: a ratio of the packed length, rounded to the nearest, half to even; or a number of tokens.
        """
        return cls(budget, newlines_compete=True)

    def select(self, image: EncodedImage) -> Selection:
        """Choose among visual tokens, or among all positions of the packed sequence."""
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
        separators = picked[packed == NEWLINE]
        return Selection(geometry, kept.view(geometry.tiles, geometry.tokens), number, separators=separators)
