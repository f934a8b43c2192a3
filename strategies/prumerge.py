"""LLaVA-PruMerge and PruMerge+: outliers of attention stay and take up what is like them.

Paper: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025,
arXiv 2403.15388. Repository: 42Shawn/LLaVA-PruMerge, commit 097c041.

With ``a = softmax(q_cls . k / sqrt(width))`` in the last layer, all heads as one: tokens with
``a > Q3 + 1.5 IQR`` stay; each adds its 32 nearest neighbors (cosine of keys) weighted by ``a``, and one more token is
the sum of the others weighted by ``a``, all before the projector. PruMerge+ also keeps every
``int(int(1 / ratio) / 3)``-th token, about three times as many as there are outliers, so that no region is empty.
Repaired: the budget says how many stay (PruMerge+: a quarter by attention, the others evenly spaced), sums are weighted
means, so that tokens keep their length, and the order is the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.image import EncodedImage
from tokenprune.policies import AllocationPolicy, MergingPolicy, OrderPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.selection import top_per_tile
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.merging import NeighborMerging
from tokenprune.strategies.components.order import tile_numbers
from tokenprune.strategies.components.selection import TopAttentionSelection, evenly_spaced
from tokenprune.strategies.trim import outlier_share


def published_picks(scores: Tensor, plus: bool) -> list[Tensor]:
    """Return the tokens that the release keeps in each tile, in its order.

    Args:
        scores: attention, `[tiles, tokens]`; outliers are counted over all tiles together.
        plus: whether to add evenly spaced tokens, as PruMerge+ does.

    Raises:
        ValueError: if there are so few or so many outliers that PruMerge+ has no step.
    """
    tokens, ratio = scores.shape[1], outlier_share(scores)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : int(tokens * ratio)]
    if not plus:
        return list(order)
    step = int(int(1 / ratio) / 3) if ratio else 0
    if not step:
        raise ValueError(
            f"PruMergePlus.release has no step at {ratio:.1%} outliers, nor has the published code: it needs more than "
            "none and at most a third. PruMergePlus() works at any budget"
        )
    spaced = torch.arange(0, tokens - 1, step, device=scores.device)
    return [torch.cat([row, spaced[~torch.isin(spaced, row)]]) for row in order]


@dataclass
class ReleasedCountAllocation(AllocationPolicy):
    """As many tokens as the release of PruMerge finds, and one for the rest, whatever the budget.

    Args:
        plus: whether evenly spaced tokens are added.
    """

    plus: bool = False

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Return the published number of each tile; one less where no place is left for the rest."""
        picks = published_picks(scores, self.plus)
        return [min(len(picked) + 1, room) for picked, room in zip(picks, capacity, strict=True)]


@dataclass
class OutlierThenSpacedSelection(TopAttentionSelection):
    """Keep the outliers of attention and evenly spaced tokens, as the release of PruMerge+ does.

    Args:
        layer: layer of the vision tower whose CLS attention is read.
        heads: how heads are combined, see `TopAttentionSelection`.
    """

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep the published picks, whatever the budgets."""
        kept = torch.zeros_like(candidates)
        for tile, picked in enumerate(published_picks(scores, plus=True)):
            kept[tile, picked] = True
        return kept & candidates


@dataclass
class ReleasedOrder(OrderPolicy):
    """Outliers by falling attention, spaced tokens, the rest; tile by tile.

    Args:
        plus: whether evenly spaced tokens were added.
    """

    plus: bool = False

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, made: Tensor) -> Tensor:
        """Return the number of the tile plus the place of the token in it, `[tiles, tokens]`."""
        place = torch.ones(kept.shape, dtype=torch.float64, device=kept.device)
        for tile, picked in enumerate(published_picks(scores, self.plus)):
            places = torch.arange(len(picked), dtype=torch.float64, device=kept.device)
            place[tile, picked] = places / (len(picked) + 1)
        return tile_numbers(kept) + place.masked_fill(made > 0, 1 - 1e-9)


@dataclass
class ImportantThenSpacedSelection(TopAttentionSelection):
    """Keep a share of the budget by attention, and evenly spaced ones of the other tokens (PruMerge+).

    Args:
        layer: layer of the vision tower whose CLS attention is read.
        heads: how heads are combined, see `TopAttentionSelection`.
        important_share: share of the budget for attention alone.
    """

    important_share: float = 0.25

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep the most attended tokens, then evenly spaced ones."""
        important = (budgets * self.important_share).round().long()
        kept = top_per_tile(scores, important, candidates)
        for tile, number in enumerate((budgets - important).tolist()):
            rest = (candidates[tile] & ~kept[tile]).nonzero()[:, 0]
            kept[tile, rest[evenly_spaced(len(rest), number).to(rest.device)]] = True
        return kept


@dataclass
class PruMerge(ComponentReducer):
    """The most attended tokens take up their nearest neighbors; one more holds the rest.

    Repaired: as many tokens as the budget says, weighted means, and the image's order.
    """

    published: ClassVar[str] = "ICCV 2025, arXiv 2403.15388"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(
        default_factory=lambda: TopAttentionSelection(layer=-1, heads="joint"), kw_only=True
    )
    merging: MergingPolicy | None = field(default_factory=NeighborMerging, kw_only=True)

    @classmethod
    def release(cls) -> PruMerge:
        """Return PruMerge as published in code: the number of outliers decides, over all tiles together."""
        return cls(
            1.0,
            newlines="drop",
            allocation=ReleasedCountAllocation(),
            merging=NeighborMerging(weights="release"),
            order=ReleasedOrder(),
            padding="ignore",
        )


@dataclass
class PruMergePlus(ComponentReducer):
    """PruMerge with evenly spaced tokens beside the most attended ones.

    Repaired: a quarter of the budget by attention, the rest evenly spaced, weighted means.
    """

    published: ClassVar[str] = "ICCV 2025, arXiv 2403.15388"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(
        default_factory=lambda: ImportantThenSpacedSelection(layer=-1, heads="joint"), kw_only=True
    )
    merging: MergingPolicy | None = field(default_factory=NeighborMerging, kw_only=True)

    @classmethod
    def release(cls) -> PruMergePlus:
        """Return PruMerge+ as published in code; above a sixth of outliers it keeps every token but the last."""
        return cls(
            1.0,
            newlines="drop",
            allocation=ReleasedCountAllocation(plus=True),
            selection=OutlierThenSpacedSelection(layer=-1, heads="joint"),
            merging=NeighborMerging(weights="release"),
            order=ReleasedOrder(plus=True),
            padding="ignore",
        )
