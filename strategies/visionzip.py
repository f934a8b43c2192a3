"""VisionZip: keeps dominant tokens by attention, and merges dropped tokens into contextual tokens.

Paper: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
arXiv 2412.04467. Repository: dvlab-research/VisionZip, commit 3151f6d.

Dominant tokens have the largest CLS attention (feature layer, summed over heads). Targets are evenly spaced among the
remaining tokens. Each token that is neither dominant nor a target is merged into the target with the most similar key,
before the projector. The release keeps 54 dominant tokens, which include CLS itself, and 10 contextual tokens. It adds
to each target the mean of the tokens merged into it. Repaired: a target becomes the mean of itself and the tokens
merged into it, targets are spread over the whole tile, and CLS is not kept. Merged tokens keep the position of their
target, and the budget is divided over the tiles and spent exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage
from tokenprune.policies import AllocationPolicy, MergingPolicy, OrderPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.merging import ContextualMerging
from tokenprune.strategies.components.order import tile_indices
from tokenprune.strategies.components.selection import TopAttentionSelection


@dataclass
class ClsDominantContextualOrder(OrderPolicy):
    """Puts the CLS, dominant, contextual tokens of the base tile before the dominant, CLS, contextual of sub-images."""

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, kind: Tensor) -> Tensor:
        """Return the order of the release, `[tiles, tokens]`; kind 1 is contextual, kind 2 is CLS."""
        base = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64, device=kept.device)
        sub_images = torch.tensor([3.0, 5.0, 4.0], dtype=torch.float64, device=kept.device)
        rank = torch.cat([base[kind[:1]], sub_images[kind[1:]]])
        return rank + (kind > 0) * tile_indices(kept) / (1 + len(kept))


@dataclass
class VisionZip(ComponentReducer):
    """Keeps the most attended tokens, and merges dropped tokens into contextual tokens.

    Repaired: contextual tokens are means, tokens stay in spatial order, and the budget is spent exactly.
    """

    published: ClassVar[str] = "CVPR 2025, arXiv 2412.04467"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=TopAttentionSelection, kw_only=True)
    merging: MergingPolicy | None = field(default_factory=ContextualMerging, kw_only=True)

    @classmethod
    def release(cls, dominant: int = 54, contextual: int = 10) -> VisionZip:
        """Return VisionZip as published in code, where the CLS token of a tile counts as dominant.

        The release does not remove padding. Here the model removes it, including merged tokens at padding positions.

        Args:
            dominant: number of dominant tokens per tile, including CLS.
            contextual: number of contextual tokens per tile.
        """
        return cls(
            Budget(dominant + contextual, per="tile"),
            newlines="drop",
            allocation=UniformAllocation(rounding="floor"),
            merging=ContextualMerging(number=contextual, combine="sum", spacing="step", cls=True),
            order=ClsDominantContextualOrder(),
            padding="ignore",
        )
