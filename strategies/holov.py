"""HoloV: attention top-k in contiguous stripes of the token sequence, with budgets by the attention of each stripe.

Paper: Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention",
NeurIPS 2025. Repository: obananas/HoloV, commit 1d2e65e.

The packed sequence is divided into P stripes. The published score of a stripe is
``mean(a' + 0.09 * var * mean|a'| / mean|var|)`` with ``a' = 1000 * attention``. Here ``var`` is the variance of the
similarities of a token inside the stripe. Because the variance is divided by its own mean, the score is
``1.09 * mean(a')`` up to rounding. So the variance has no effect, and the method reduces to attention sums per stripe
with attention top-k inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.budget import Budget, apportion_tensor, as_device_tensor, read_numbers
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy, OrderPolicy, SelectionPolicy
from tokenprune.selection import count_rows, true_indices
from tokenprune.strategies.components.allocation import GlobalTopAllocation


def published_stripe_budgets(attention: Tensor, total: int) -> Tensor:
    """Divide a budget over stripes as the release does, and return the tokens per stripe, `[stripes]`.

    Shares are rounded down, the stripes with the largest scores get the remainder, and stripe sizes are ignored.

    Args:
        attention: mean attention of each stripe, float64 `[stripes]`.
        total: number of tokens to divide.
    """
    scores = 1.09 * 1000 * attention
    budgets = (total * scores / (scores.sum() + 1e-6)).floor().long()
    rank = scores.argsort(descending=True, stable=True).argsort()
    missing = total - budgets.sum()
    return budgets + missing // len(rank) + (rank < missing % len(rank))


def divide_into_stripes(length: int, stripes: int, device: torch.device) -> tuple[list[int], Tensor]:
    """Return the size of each stripe of a sequence, and the stripe index of each position, int64 `[length]`.

    If the length is not divisible by the number of stripes, the first stripes are longer by one.

    Args:
        length: length of the sequence.
        stripes: number of stripes; at most ``length`` are used.
        device: the device of the stripe indices.
    """
    number = max(1, min(stripes, length))
    sizes = [length // number + (index < length % number) for index in range(number)]
    index = torch.arange(number, device=device)
    return sizes, index.repeat_interleave(as_device_tensor(tuple(sizes), device), output_size=length)


@dataclass
class StripeOrder(OrderPolicy):
    """Sorts each stripe by descending attention; completely kept stripes stay in packed order (HoloV).

    Args:
        stripes: number of stripes of the sequence.
    """

    stripes: int = 16

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, kind: Tensor) -> Tensor:
        """Return the stripe index plus the rank of the token inside its stripe as a fraction, `[tiles, tokens]`."""
        rank = torch.zeros(kept.shape, dtype=torch.float64, device=kept.device)
        for tile in range(len(kept)):
            indices = (scores[tile] > -torch.inf).nonzero()[:, 0]
            sizes, stripe = divide_into_stripes(len(indices), self.stripes, indices.device)
            fraction = scores[tile, indices].argsort(descending=True, stable=True).argsort().double()
            fraction = fraction / (1 + len(indices))
            n_kept = torch.bincount(stripe[kept[tile, indices]], minlength=len(sizes))
            is_complete = as_device_tensor(tuple(sizes), indices.device) == n_kept
            rank[tile, indices] = stripe + fraction.masked_fill(is_complete[stripe], 0)
        return rank


@dataclass
class StripedAttentionSelection(SelectionPolicy):
    """Keeps the most attended tokens of each stripe; the budget of a stripe is proportional to its attention (HoloV).

    Args:
        stripes: number of stripes of the candidates of a tile (or of the image, if the allocation pools the tiles).
        layer: layer of the vision tower whose CLS attention is read.
        rounding: ``"largest_remainder"`` spends the budget exactly; ``"release"`` loses the surplus of full stripes.
    """

    stripes: int = 16
    layer: LayerChoice = "feature"
    rounding: Literal["largest_remainder", "release"] = "largest_remainder"

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return self.rounding == "largest_remainder"

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the configured layer."""
        return (Signal("cls_attention", self.layer),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return CLS attention, mean over heads, `[tiles, tokens]`."""
        return image.cls_attention(self.layer).mean(dim=1)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Divide the budget of each tile over its stripes, and keep the most attended tokens of each stripe."""
        kept = []
        for tile, (budget, length) in enumerate(zip(read_numbers(budgets), count_rows(candidates), strict=True)):
            indices, device = true_indices(candidates[tile], length), candidates.device
            sizes, stripe = divide_into_stripes(length, self.stripes, device)
            values, size = scores[tile, indices], as_device_tensor(tuple(sizes), device)
            attention = values.double().clamp(min=0)
            mean_attention = torch.zeros_like(size, dtype=torch.float64).index_add(0, stripe, attention) / size
            if self.rounding == "release":
                shares = published_stripe_budgets(mean_attention, budget)
            else:
                shares = apportion_tensor(budget, mean_attention, sizes)
            order = values.argsort(descending=True, stable=True)
            order = order[stripe[order].argsort(stable=True)]  # by stripe, then by descending attention
            rank_in_stripe = torch.arange(length, device=device) - (size.cumsum(0) - size)[stripe]
            is_kept = rank_in_stripe < shares[stripe]
            kept.append(torch.zeros_like(candidates[tile]).scatter(0, indices[order], is_kept))
        return torch.stack(kept)


@dataclass
class HoloV(ComponentReducer):
    """Keeps the most attended tokens of each stripe of the sequence, with budgets by the attention of the stripes.

    Repaired: other stripes get the surplus of full stripes, instead of zero vectors.
    """

    published: ClassVar[str] = "NeurIPS 2025, arXiv 2510.02912"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=GlobalTopAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=StripedAttentionSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, stripes: int = 16) -> HoloV:
        """Return HoloV as published in code: the surplus of full stripes is lost, and newline tokens are dropped.

        The release fills the lost positions with zero vectors. Here they are missing.

        Args:
            budget: number of tokens that may enter the LLM, or their share.
            stripes: number of stripes of the packed sequence.
        """
        selection = StripedAttentionSelection(stripes, rounding="release")
        return cls(budget, newlines="drop", selection=selection, order=StripeOrder(stripes))
