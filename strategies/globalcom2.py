"""GlobalCom2: the base tile guides how far each sub-image is compressed, and which of its tokens stay.

Paper: Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
Vision-Language Models", AAAI 2026. Repository: xuyang-liu16/GlobalCom2, commit 96b2d00.

With ``g`` the CLS logits (before softmax, mean over heads) of the last ViT layer and R the retention ratio: the sum of
the base tile's ``g`` over the part of each sub-image gives ``sigma = softmax(sums / 10)``; sub-image ``i`` keeps the
share ``min(1, R * (1 + sigma_i - mean(sigma)))`` of its tokens, the base tile the share R. Inside a sub-image tokens
are ranked by the sum of two vectors of unit length: its own ``g``, and the base tile's ``g`` enlarged to the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenprune.budget import Budget, apportion, ratio_of
from tokenprune.image import EncodedImage, Signal, TileGeometry
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import base_tile_coverage
from tokenprune.strategies.components.order import ScoreOrder


def enlarged(base: Tensor, geometry: TileGeometry) -> Tensor:
    """Stretch a map of the base tile over the image on the canvas of the sub-images.

    Args:
        base: one number per token of the base tile, `[tokens]`.
        geometry: the layout of the image.

    Returns:
        One number per token of the sub-images, zero at padding, `[sub_images, tokens]`.
    """
    (rows, cols), (height, width) = geometry.tile_grid, geometry.token_grid
    sizes = {"rows": rows, "cols": cols, "height": height, "width": width}
    to_canvas = "(rows cols) (height width) -> (rows height) (cols width)"
    valid = rearrange(geometry.valid[1:], to_canvas, **sizes)
    down, across = valid.any(dim=1).nonzero()[:, 0], valid.any(dim=0).nonzero()[:, 0]
    canvas = base.new_zeros(valid.shape)
    if len(down) and len(across):
        size = (len(down), len(across))
        stretched = F.interpolate(base.view(1, 1, height, width), size=size, mode="bilinear", align_corners=False)
        canvas[down[0] : down[-1] + 1, across[0] : across[-1] + 1] = stretched[0, 0]
    return rearrange(canvas, "(rows height) (cols width) -> (rows cols) (height width)", **sizes)


@dataclass
class GuidedAllocation(AllocationPolicy):
    """Tokens in proportion to tile size, corrected by how much of the base tile's CLS logits a sub-image draws.

    Args:
        layer: layer of the vision tower whose CLS logits are read.
        temperature: divides the sums of logits before the softmax.
        region: how sub-images map to the base tile; see `base_tile_coverage`.
        retention: None divides the budget exactly; a ratio keeps this share of each tile as the release does, rounded
            down, whatever the budget.
    """

    layer: LayerChoice = -1
    temperature: float = 10.0
    region: Literal["exact", "quadrant"] = "exact"
    retention: float | None = None

    @property
    def needs(self) -> Sequence[Signal]:
        """The base tile's CLS logits of the chosen layer."""
        return (Signal("cls_logits", self.layer),)

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Divide the budget by guided compression ratios."""
        factors = [1.0]
        if image.geometry.sub_images:
            logits = image.cls_logits(self.layer)[0].mean(dim=0).double().cpu()
            sums = base_tile_coverage(image.geometry, self.region).double().cpu() @ logits
            sigma = (sums / self.temperature).softmax(dim=0)
            factors += (1 + sigma - sigma.mean()).tolist()
        if self.retention is not None:
            shares = [self.retention * factor for factor in factors]
            return [int(room * min(1.0, share)) for room, share in zip(capacity, shares, strict=True)]
        return apportion(total, [room * factor for room, factor in zip(capacity, factors, strict=True)], capacity)


@dataclass
class LocalGlobalSelection(SelectionPolicy):
    """Keep tokens that both their own tile and the base tile attend to.

    Args:
        layer: layer of the vision tower whose CLS logits are read.
    """

    layer: LayerChoice = -1

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS logits of the chosen layer."""
        return (Signal("cls_logits", self.layer),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return the base tile's logits, and for sub-images the sum of local and global ones, `[tiles, tokens]`."""
        logits = image.cls_logits(self.layer).mean(dim=1)
        if not image.geometry.sub_images:
            return logits
        valid = image.geometry.valid[1:].to(logits.device)
        local = F.normalize(logits[1:] * valid, dim=1)
        guide = F.normalize(enlarged(logits[0], image.geometry) * valid, dim=1)
        return torch.cat([logits[:1], local + guide])


@dataclass
class GlobalCom2(ComponentReducer):
    """The base tile's CLS logits say how far each sub-image is compressed, and help to rank its tokens.

    Repaired: the budget is spent exactly, and sub-images map to what they really show.
    """

    published: ClassVar[str] = "AAAI 2026, arXiv 2501.05179"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=GuidedAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=LocalGlobalSelection, kw_only=True)

    @classmethod
    def release(cls, retention: float | str = 0.25) -> GlobalCom2:
        """Return GlobalCom2 as published in code: a retention ratio per unpadded tile, all newlines on top.

        The base tile's tokens come in the order of their scores. Kept tokens of sub-images stand at their true places
        here; the release puts them at their number inside the unpadded tile, which is another row where there is
        padding.

        Args:
            retention: share of the unpadded tokens to keep (R), as a number or a text such as ``"20%"``.
        """
        ratio = ratio_of(retention)
        allocation = GuidedAllocation(region="quadrant", retention=ratio)
        return cls(Budget(ratio, of="unpadded"), newlines="keep", allocation=allocation, order=ScoreOrder(tiles="base"))
