"""GlobalCom2: the CLS logits of the base tile determine the budget of each sub-image and the ranks of its tokens.

Paper: Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
Vision-Language Models", AAAI 2026. Repository: xuyang-liu16/GlobalCom2, commit 96b2d00.

``g`` are the CLS logits (before softmax, mean over heads) of the last ViT layer, and R is the retention ratio. The sums
of the base tile's ``g`` over the region of each sub-image give ``sigma = softmax(sums / 10)``. Sub-image ``i`` keeps
the share ``min(1, R * (1 + sigma_i - mean(sigma)))`` of its tokens, and the base tile keeps the share R. Tokens of a
sub-image are ranked by the sum of two unit vectors: the ``g`` of the sub-image, and the ``g`` of the base tile,
enlarged to the size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenprune.budget import Budget, apportion_tensor, as_device_tensor, parse_ratio
from tokenprune.component_reducer import ComponentReducer
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import base_tile_coverage
from tokenprune.strategies.components.order import ScoreOrder


def enlarge_base_map(base_map: Tensor, geometry: TileGeometry) -> Tensor:
    """Interpolate a map of the base tile to the tokens of the sub-images, `[sub_images, tokens]`; 0 at padding.

    Args:
        base_map: one number per token of the base tile, `[tokens]`.
        geometry: the layout of the image.
    """
    (rows, cols), (height, width) = geometry.tile_grid, geometry.token_grid
    sizes = {"rows": rows, "cols": cols, "height": height, "width": width}
    to_canvas = "(rows cols) (height width) -> (rows height) (cols width)"
    valid = rearrange(geometry.valid[1:], to_canvas, **sizes)
    ys, xs = valid.any(dim=1).nonzero()[:, 0], valid.any(dim=0).nonzero()[:, 0]
    canvas = base_map.new_zeros(valid.shape)
    if len(ys) and len(xs):
        region = canvas[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]  # the vision tower can drop rows inside it
        source, size = base_map.view(1, 1, height, width), tuple(region.shape)
        region.copy_(F.interpolate(source, size=size, mode="bilinear", align_corners=False)[0, 0])
    return rearrange(canvas, "(rows height) (cols width) -> (rows cols) (height width)", **sizes)


@dataclass
class GuidedAllocation(AllocationPolicy):
    """Divides the budget by tile size and by the CLS logits of the base tile in each sub-image (GlobalCom2).

    Args:
        layer: layer of the vision tower whose CLS logits are read.
        temperature: divisor of the sums of logits before the softmax.
        region: how sub-images map to the base tile; see `base_tile_coverage`.
        retention: None divides the budget exactly. A ratio keeps this share of each tile, rounded down, and ignores the
            budget, as the release does.
    """

    layer: LayerChoice = -1
    temperature: float = 10.0
    region: Literal["exact", "quadrant"] = "exact"
    retention: float | None = None

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS logits of the configured layer."""
        return (Signal("cls_logits", self.layer),)

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> Tensor:
        """Divide the budget by capacity and by the factors of the sub-images."""
        limits = as_device_tensor(tuple(capacity), image.device)
        factors = torch.ones_like(limits, dtype=torch.float64)
        if image.geometry.sub_images:
            logits = image.cls_logits(self.layer)[0].mean(dim=0).double()
            sums = base_tile_coverage(image.geometry.to(image.device), self.region).double() @ logits
            sigma = (sums / self.temperature).softmax(dim=0)
            factors = torch.cat([factors[:1], 1 + sigma - sigma.mean()])
        if self.retention is not None:
            return (limits * (self.retention * factors).clamp(max=1)).long()
        return apportion_tensor(total, limits * factors, capacity)


@dataclass
class LocalGlobalSelection(SelectionPolicy):
    """Keeps tokens with large CLS logits in their tile and in the base tile (GlobalCom2).

    Args:
        layer: layer of the vision tower whose CLS logits are read.
    """

    layer: LayerChoice = -1

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS logits of the configured layer."""
        return (Signal("cls_logits", self.layer),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return the logits of the base tile, and local plus global logits of sub-images, `[tiles, tokens]`."""
        logits = image.cls_logits(self.layer).mean(dim=1)
        if not image.geometry.sub_images:
            return logits
        valid = image.geometry.valid[1:].to(logits.device)
        local_map = F.normalize(logits[1:] * valid, dim=1)
        global_map = F.normalize(enlarge_base_map(logits[0], image.geometry) * valid, dim=1)
        return torch.cat([logits[:1], local_map + global_map])


@dataclass
class GlobalCom2(ComponentReducer):
    """Divides the budget over the sub-images, and ranks their tokens, with the CLS logits of the base tile.

    Repaired: the budget is spent exactly, and sub-images map to their exact regions of the base tile.
    """

    published: ClassVar[str] = "AAAI 2026, arXiv 2501.05179"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=GuidedAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=LocalGlobalSelection, kw_only=True)

    @classmethod
    def release(cls, retention: float | str = 0.25) -> GlobalCom2:
        """Return GlobalCom2 as published in code: a retention ratio per unpadded tile, plus all newline tokens.

        Tokens of the base tile are sorted by score. Kept tokens of sub-images have their true positions here. The
        release uses their index inside the unpadded tile instead, which is a different row if the tile has padding.

        Args:
            retention: share of the unpadded tokens to keep (R), as a number or a string such as ``"20%"``.
        """
        ratio = parse_ratio(retention)
        allocation = GuidedAllocation(region="quadrant", retention=ratio)
        return cls(Budget(ratio, of="unpadded"), newlines="keep", allocation=allocation, order=ScoreOrder(tiles="base"))
