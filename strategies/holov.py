"""HoloV: attention top-k inside contiguous stripes of the token sequence, paid by the attention that each stripe draws.

Paper: Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention",
NeurIPS 2025. Repository: obananas/HoloV, commit 1d2e65e.

The packed sequence is cut into P stripes. The published score of a stripe is
``mean(a' + 0.09 * var * mean|a'| / mean|var|)`` with ``a' = 1000 * attention`` and ``var`` the variance of a token's
similarities inside the stripe. Because the variance is divided by its own mean, the score is ``1.09 * mean(a')`` up to
rounding: variance decides nothing, and the method is attention mass per stripe with attention top-k inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokenprune.budget import Budget, apportion
from tokenprune.components import AllocationPolicy, SelectionPolicy
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import GlobalTopAllocation


def published_stripe_budgets(mass: Sequence[float], total: int) -> list[int]:
    """Divide a budget over stripes as the release does: rounded down, the rest to the largest, sizes ignored.

    Args:
        mass: mean attention of each stripe.
        total: tokens to divide.
    """
    scores = 1.09 * 1000 * torch.tensor(mass, dtype=torch.float64)
    budgets = (total * scores / (scores.sum() + 1e-6)).floor().long()
    order = scores.argsort(descending=True, stable=True)
    for number in range(total - int(budgets.sum())):
        budgets[order[number % len(order)]] += 1
    counts: list[int] = budgets.tolist()
    return counts


@dataclass
class StripedAttention(SelectionPolicy):
    """Keep the most attended tokens of each stripe of the sequence; stripes are paid by their mean attention (HoloV).

    Args:
        stripes: number of stripes that the candidates of a tile (or of the image, in one pool) are cut into.
        layer: layer of the vision tower whose CLS attention is read.
        rounding: ``"largest_remainder"`` spends the budget exactly; ``"release"`` loses what a stripe cannot hold.
    """

    stripes: int = 16
    layer: LayerChoice = "feature"
    rounding: Literal["largest_remainder", "release"] = "largest_remainder"

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the chosen layer."""
        return (Signal("cls_attention", self.layer),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return CLS attention, mean over heads, `[tiles, tokens]`."""
        return image.cls_attention(self.layer).mean(dim=1)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Divide each tile's budget over its stripes and keep the top of each."""
        kept = torch.zeros_like(candidates)
        for tile, budget in enumerate(budgets.tolist()):
            stripes = [part for part in candidates[tile].nonzero()[:, 0].tensor_split(self.stripes) if len(part)]
            mass = [float(scores[tile, part].double().clamp(min=0).mean()) for part in stripes]
            sizes = [len(part) for part in stripes]
            shares = published_stripe_budgets(mass, budget) if self.rounding == "release" else []
            for part, share in zip(stripes, shares or apportion(budget, mass, sizes), strict=True):
                kept[tile, part[scores[tile, part].argsort(descending=True, stable=True)[:share]]] = True
        return kept


@dataclass
class HoloV(ComponentReducer):
    """HoloV, repaired: full stripes pass their surplus on, instead of filling up with zero vectors."""

    allocation: AllocationPolicy = field(default_factory=GlobalTopAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=StripedAttention, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | Budget = 0.2, stripes: int = 16) -> HoloV:
        """Return HoloV as published in code: what a stripe cannot hold is lost, and newlines are dropped.

        The release fills lost places with zero vectors; here they are simply missing.

        Args:
            budget: tokens that may enter the LLM.
            stripes: number of stripes of the packed sequence.
        """
        return cls(budget, newlines="drop", selection=StripedAttention(stripes, rounding="release"))
