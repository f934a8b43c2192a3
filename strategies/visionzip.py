"""VisionZip: dominant tokens by attention, and contextual tokens that gather the others.

Paper: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
arXiv 2412.04467. Repository: dvlab-research/VisionZip, commit 3151f6d.

Dominant are the tokens with the largest CLS attention (feature layer, summed over heads). Of the others, evenly spaced
ones are targets; each remaining one joins the target with the most similar key, before the projector. The release gives
54 dominant tokens, one of them CLS itself, to every 10 contextual ones, and adds to a target the mean of those that
joined it. Repaired: a target becomes the mean of itself and what joined it, targets are spread over the whole tile,
CLS takes no part, merged tokens stand where they come from, and the budget is shared by tile and spent exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.image import EncodedImage
from tokenprune.policies import AllocationPolicy, MergingPolicy, OrderPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.merging import ContextualMerging
from tokenprune.strategies.components.order import tile_numbers
from tokenprune.strategies.components.selection import TopAttentionSelection


@dataclass
class ClsDominantContextualOrder(OrderPolicy):
    """CLS, dominant, contextual tokens of the base tile; then all sub-images' dominant, CLS and contextual ones."""

    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, made: Tensor) -> Tensor:
        """Return the release's order, `[tiles, tokens]`; kind 1 is contextual, kind 2 is CLS."""
        base = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64, device=kept.device)
        sub_images = torch.tensor([3.0, 5.0, 4.0], dtype=torch.float64, device=kept.device)
        rank = torch.cat([base[made[:1]], sub_images[made[1:]]])
        return rank + (made > 0) * tile_numbers(kept) / (1 + len(kept))


@dataclass
class VisionZip(ComponentReducer):
    """The most attended tokens, and contextual ones that gather the others.

    Repaired: contextual tokens are means in the image's order, and the budget is spent exactly.
    """

    published: ClassVar[str] = "CVPR 2025, arXiv 2412.04467"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=TopAttentionSelection, kw_only=True)
    merging: MergingPolicy | None = field(default_factory=ContextualMerging, kw_only=True)

    @classmethod
    def release(cls, dominant: int = 54, contextual: int = 10) -> VisionZip:
        """Return VisionZip as published in code; its CLS tokens count as dominant.

        The release does not remove padding; here the model does, and takes merged tokens that stand there with it.

        Args:
            dominant: dominant tokens of a tile, CLS among them.
            contextual: contextual tokens of a tile.
        """
        return cls(
            Budget(dominant + contextual, per="tile"),
            newlines="drop",
            allocation=UniformAllocation(rounding="floor"),
            merging=ContextualMerging(number=contextual, combine="sum", spacing="step", cls=True),
            order=ClsDominantContextualOrder(),
            padding="ignore",
        )
