"""Measures how much of the evidence of a question the kept tokens cover, without a model.

The evidence of a question are the regions of the image that show its answer. A kept token covers the part of the image
that its patch shows. Merged tokens are not counted: the information that they add to a kept token is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from tokenprune.geometry import TileGeometry, region_coverage

Region: TypeAlias = tuple[float, float, float, float]
"""Top, left, bottom, right in fractions of the image."""
EvidenceTiles = Literal["tiles", "base", "either"]
"""Tiles that show the evidence: the sub-images, the base tile, or both."""


def evidence_coverage(
    geometry: TileGeometry, kept: Tensor, regions: Sequence[Region], tiles: EvidenceTiles = "either"
) -> float:
    """Return the share of the evidence that kept tokens cover, from 0 to 1.

    The share is computed by area for each region and averaged over the regions. The valid tokens of the sub-images
    divide the image into a grid of equal parts; the tokens of the base tile do the same.

    Args:
        geometry: the layout of the image. If it has no sub-images, the base tile replaces them.
        kept: the kept tokens, bool `[tiles, tokens]`.
        regions: the regions of the evidence, each with a positive area; at least one.
        tiles: the tiles that show the evidence. For ``"either"``, the larger share counts for each region.
    """
    boxes, mask = torch.tensor(regions, dtype=torch.float64), kept.cpu()
    shares = {"base": _covered_share(boxes, mask[0].view(geometry.token_grid))}
    shares["tiles"] = (
        _covered_share(boxes, _sub_image_tokens(geometry, mask)) if geometry.sub_images else shares["base"]
    )
    shares["either"] = torch.maximum(shares["base"], shares["tiles"])
    return shares[tiles].mean().item()


def _sub_image_tokens(geometry: TileGeometry, kept: Tensor) -> Tensor:
    """Return which valid tokens of the sub-images are kept, at their places in the image, bool `[rows, cols]`."""
    (rows, cols), (height, width) = geometry.tile_grid, geometry.token_grid
    sizes = {"rows": rows, "cols": cols, "height": height, "width": width}
    kept_canvas, valid = (
        rearrange(mask[1:], "(rows cols) (height width) -> (rows height) (cols width)", **sizes)
        for mask in (kept, geometry.valid.cpu())
    )
    return kept_canvas[valid.any(dim=1)][:, valid.any(dim=0)]


def _covered_share(boxes: Tensor, kept: Tensor) -> Tensor:
    """Return the share of each box that kept tokens cover, `[boxes]`.

    Args:
        boxes: top, left, bottom, right in fractions of the image, `[boxes, 4]`.
        kept: the kept tokens of a grid that divides the image, bool `[rows, cols]`.
    """
    areas = region_coverage(boxes, (kept.shape[0], kept.shape[1]))
    total = areas.sum(dim=1).clamp(min=torch.finfo(areas.dtype).tiny)  # zero if a layout has no valid token
    return (areas * kept.flatten()).sum(dim=1) / total
