"""LLaVA-PruMerge and PruMerge+: keep attention outliers and merge similar tokens into them.

Paper: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025,
arXiv 2403.15388. Repository: 42Shawn/LLaVA-PruMerge, commit 097c041.

The attention is ``a = softmax(q_cls . k / sqrt(width))`` in the last layer, over the concatenated heads. Tokens with
``a > Q3 + 1.5 IQR`` are kept. Each kept token adds its 32 nearest neighbors (cosine of keys), weighted by ``a``. One
additional token is the sum of the dropped tokens, weighted by ``a``. All sums are computed before the projector.
PruMerge+ also keeps every ``int(int(1 / ratio) / 3)``-th token, about three times the number of outliers, so that no
region is empty. Repaired: the budget determines the number of kept tokens (PruMerge+: a quarter by attention, three
quarters evenly spaced), sums are weighted means, so the norms of tokens are preserved, and the tokens stay in spatial
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.budget import check_share
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage
from tokenprune.policies import AllocationPolicy, MergingPolicy, OrderPolicy, SelectionPolicy
from tokenprune.selection import top_per_tile
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.merging import NeighborMerging
from tokenprune.strategies.components.order import tile_indices
from tokenprune.strategies.components.selection import TopAttentionSelection, sample_mask
from tokenprune.strategies.trim import outlier_share


def published_picks(scores: Tensor, plus: bool) -> list[Tensor]:
    """Return the token indices that the release keeps in each tile, in its order, `[kept]` per tile.

    Args:
        scores: attention, `[tiles, tokens]`; the share of outliers is computed over all tiles together.
        plus: whether to add evenly spaced tokens, as PruMerge+ does.

    Raises:
        ValueError: if PruMerge+ has no step, because there are no outliers or more than a third.
    """
    tokens, ratio = scores.shape[1], outlier_share(scores)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : int(tokens * ratio)]
    if not plus:
        return list(order)
    step = int(int(1 / ratio) / 3) if ratio else 0
    if not step:
        raise ValueError(
            f"PruMergePlus.release has no step at {ratio:.1%} outliers, like the published code: it requires at least "
            "one outlier and at most a third of the tokens. Use PruMergePlus(), which works at any budget"
        )
    spaced = torch.arange(0, tokens - 1, step, device=scores.device)
    return [torch.cat([row, spaced[~torch.isin(spaced, row)]]) for row in order]


@dataclass
class ReleasedCountAllocation(AllocationPolicy):
    """Grants each tile the number of tokens of PruMerge's release, plus one merged token, and ignores the budget.

    Args:
        plus: whether the evenly spaced tokens of PruMerge+ are included.
    """

    plus: bool = False

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Return the published number of tokens per tile, without the merged token if the tile is full."""
        picks = published_picks(scores, self.plus)
        return [min(len(picked) + 1, limit) for picked, limit in zip(picks, capacity, strict=True)]


@dataclass
class OutlierThenSpacedSelection(TopAttentionSelection):
    """Keeps attention outliers and evenly spaced tokens, as the release of PruMerge+ does.

    Args:
        layer: layer of the vision tower whose CLS attention is read.
        heads: how heads are combined, see `TopAttentionSelection`.
    """

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep the published picks, and ignore the budgets."""
        kept = torch.zeros_like(candidates)
        for tile, picked in enumerate(published_picks(scores, plus=True)):
            kept[tile, picked] = True
        return kept & candidates


@dataclass
class ReleasedOrder(OrderPolicy):
    """Sorts each tile into outliers by descending attention, evenly spaced tokens and merged tokens.

    Args:
        plus: whether the evenly spaced tokens of PruMerge+ are included.
    """

    plus: bool = False

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, kind: Tensor) -> Tensor:
        """Return the tile index plus the rank of the token inside its tile as a fraction, `[tiles, tokens]`."""
        rank_in_tile = torch.ones(kept.shape, dtype=torch.float64, device=kept.device)
        for tile, picked in enumerate(published_picks(scores, self.plus)):
            ranks = torch.arange(len(picked), dtype=torch.float64, device=kept.device)
            rank_in_tile[tile, picked] = ranks / (len(picked) + 1)
        return tile_indices(kept) + rank_in_tile.masked_fill(kind > 0, 1 - 1e-9)


@dataclass
class ImportantThenSpacedSelection(TopAttentionSelection):
    """Spends a share of the budget by attention, and the remainder on evenly spaced tokens (PruMerge+).

    Args:
        layer: layer of the vision tower whose CLS attention is read.
        heads: how heads are combined, see `TopAttentionSelection`.
        important_share: share of the budget for the most attended tokens.
    """

    important_share: float = 0.25

    def __post_init__(self) -> None:
        """Check the options when the component is created."""
        super().__post_init__()
        check_share("important_share", self.important_share)

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return True

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep the most attended tokens, then evenly spaced tokens among the remaining ones."""
        important = (budgets * self.important_share).round().long()
        kept = top_per_tile(scores, important, candidates)
        return kept | sample_mask(candidates & ~kept, (budgets - important)[:, None])


@dataclass
class PruMerge(ComponentReducer):
    """Merges the most attended tokens with their nearest neighbors, and dropped tokens into one additional token.

    Repaired: the budget determines the number of tokens, sums are weighted means, and tokens stay in spatial order.
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
        """Return PruMerge as published in code: the number of outliers over all tiles determines the kept tokens."""
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
    """Extends PruMerge: keeps evenly spaced tokens in addition to the most attended tokens.

    Repaired: attention selects a quarter of the budget, three quarters are evenly spaced, and sums are weighted means.
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
        """Return PruMerge+ as published in code.

        If more than a sixth of the tokens are outliers, it keeps every token except the last.
        """
        return cls(
            1.0,
            newlines="drop",
            allocation=ReleasedCountAllocation(plus=True),
            selection=OutlierThenSpacedSelection(layer=-1, heads="joint"),
            merging=NeighborMerging(weights="release"),
            order=ReleasedOrder(plus=True),
            padding="ignore",
        )
