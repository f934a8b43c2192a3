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
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.budget import Budget, apportion
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy, OrderPolicy, SelectionPolicy
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


def stripe_of(length: int, stripes: int) -> Tensor:
    """Return the number of the stripe of each place of a sequence; the first ones are longer by one, `[length]`.

    Args:
        length: places of the sequence.
        stripes: stripes to cut it into; there are never more than places.
    """
    parts = torch.arange(length).tensor_split(max(1, min(stripes, length)))
    return torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)])


@dataclass
class StripeOrder(OrderPolicy):
    """Stripe by stripe, the most attended token first; stripes that are kept whole stay in their order (HoloV).

    Args:
        stripes: number of stripes of the sequence.
    """

    stripes: int = 16

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, made: Tensor) -> Tensor:
        """Return the number of the stripe plus the place of the token in it, `[tiles, tokens]`."""
        rank = torch.zeros(kept.shape, dtype=torch.float64, device=kept.device)
        for tile in range(len(kept)):
            places = (scores[tile] > -torch.inf).nonzero()[:, 0]
            stripe = stripe_of(len(places), self.stripes).to(places.device)
            place = scores[tile, places].argsort(descending=True, stable=True).argsort().double() / (1 + len(places))
            whole = torch.bincount(stripe) == torch.bincount(stripe[kept[tile, places]], minlength=int(stripe[-1]) + 1)
            rank[tile, places] = stripe + place.masked_fill(whole[stripe], 0)
        return rank


@dataclass
class StripedAttentionSelection(SelectionPolicy):
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
            places = candidates[tile].nonzero()[:, 0]
            values, stripe = scores[tile, places], stripe_of(len(places), self.stripes).to(places.device)
            sizes = torch.bincount(stripe)
            attention = values.double().clamp(min=0)
            mass = (attention.new_zeros(len(sizes)).index_add(0, stripe, attention) / sizes).tolist()
            if self.rounding == "release":
                shares = published_stripe_budgets(mass, budget)
            else:
                shares = apportion(budget, mass, sizes.tolist())
            best = values.argsort(descending=True, stable=True)
            best = best[stripe[best].argsort(stable=True)]  # stripe by stripe, the most attended first
            place_in_stripe = torch.arange(len(best), device=best.device) - (sizes.cumsum(0) - sizes)[stripe]
            kept[tile, places[best[place_in_stripe < torch.tensor(shares, device=best.device)[stripe]]]] = True
        return kept


@dataclass
class HoloV(ComponentReducer):
    """The most attended tokens of each stripe of the sequence, stripes paid by their attention.

    Repaired: full stripes pass their surplus on, instead of filling up with zero vectors.
    """

    published: ClassVar[str] = "NeurIPS 2025, arXiv 2510.02912"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=GlobalTopAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=StripedAttentionSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, stripes: int = 16) -> HoloV:
        """Return HoloV as published in code: stripes by attention, surplus is lost, and newlines are dropped.

        The release fills lost places with zero vectors; here they are simply missing.

        Args:
            budget: tokens that may enter the LLM.
            stripes: number of stripes of the packed sequence.
        """
        selection = StripedAttentionSelection(stripes, rounding="release")
        return cls(budget, newlines="drop", selection=selection, order=StripeOrder(stripes))
