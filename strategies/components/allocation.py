"""Allocation policies: divide the budget of an image over its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from einops import reduce
from torch import Tensor

from tokenprune.budget import apportion, apportion_tensor, as_device_tensor, check_share
from tokenprune.geometry import RECENT_LAYOUTS, TileGeometry, region_coverage
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy
from tokenprune.selection import top_of_image


def base_tile_coverage(geometry: TileGeometry, region: str) -> Tensor:
    """Return the share of each base-tile token that lies in each sub-image, float32 `[sub_images, tokens]`.

    Later calls with the same layout return the same tensor; do not modify it. A compiled graph computes the tensor on
    the device, because a copy from the host cannot be part of a CUDA graph.

    Args:
        geometry: the layout of the image.
        region: ``"exact"`` uses the area of the image that a sub-image covers. ``"quadrant"`` divides the base tile
            evenly into the tile grid. ``"stripe"`` divides the row-major token sequence into runs of equal length, as
            HiRED's release does. These runs are horizontal stripes for every tile grid.

    Raises:
        ValueError: if the region is not known, or if there are more stripes than tokens.
    """
    return _compute_coverage(geometry, region) if torch.compiler.is_compiling() else _cache_coverage(geometry, region)


@lru_cache(maxsize=RECENT_LAYOUTS)
def _cache_coverage(geometry: TileGeometry, region: str) -> Tensor:
    with torch.inference_mode(False):  # a later call may record gradients
        if geometry.original is geometry:
            return _compute_coverage(geometry, region)
        return _cache_coverage(geometry.original, region).to(geometry.regions.device)


def _compute_coverage(geometry: TileGeometry, region: str) -> Tensor:
    (rows, cols), device = geometry.tile_grid, geometry.regions.device
    if region == "exact":
        return region_coverage(geometry.regions, geometry.token_grid)
    if region == "quadrant":
        ys, xs = (torch.arange(number + 1, device=device) / number for number in (rows, cols))
        corners = [torch.cartesian_prod(ys[edge], xs[edge]).view(-1, 2) for edge in (slice(-1), slice(1, None))]
        return region_coverage(torch.cat(corners, dim=1), geometry.token_grid)
    if region == "stripe":
        stripe_length = geometry.tokens // (rows * cols)
        if not stripe_length:
            raise ValueError(
                f"region='stripe' cannot cut {geometry.tokens} tokens into {rows * cols} stripes; use 'exact'"
            )
        stripe = torch.arange(geometry.tokens, device=device) // stripe_length
        return (stripe == torch.arange(rows * cols, device=device)[:, None]).float()
    raise ValueError(f"region={region!r} is not known; use 'exact', 'quadrant' or 'stripe'")


@dataclass
class VisualContentAllocation(AllocationPolicy):
    """Gives the base tile a fixed share, and divides the remaining budget by early CLS attention (HiRED).

    ``N_0 = base_share * N`` and ``N_i = (N - N_0) * s_i / sum(s)``. The visual content ``s_i`` is the CLS attention of
    the base tile, summed over heads and over the region of sub-image ``i`` (arXiv 2408.10945, Eq. 1 and Alg. 1).

    Args:
        base_share: share of the budget for the base tile (alpha), 0.0 to 1.0.
        layer: layer of the vision tower whose CLS attention is read.
        region: how sub-images map to the base tile; see `base_tile_coverage`.
        statistic: ``"mass"`` sums the attention. ``"top_count"`` counts the ``(1 - base_share) * tokens`` most attended
            base tokens that lie in the sub-image, as the release does.
        rounding: ``"largest_remainder"`` spends the budget exactly and moves the surplus of full tiles to tiles with
            free capacity. ``"floor"`` rounds the budget of each tile down and redistributes nothing.
    """

    base_share: float = 0.5
    layer: LayerChoice = "first"
    region: Literal["exact", "quadrant", "stripe"] = "exact"
    statistic: Literal["mass", "top_count"] = "mass"
    rounding: Literal["largest_remainder", "floor"] = "largest_remainder"

    def __post_init__(self) -> None:
        """Check the options when the component is created."""
        super().__post_init__()
        check_share("base_share", self.base_share)

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the configured layer."""
        return (Signal("cls_attention", self.layer),)

    def content(self, image: EncodedImage) -> Tensor:
        """Return the visual content ``s_i`` of each sub-image, float64 `[sub_images]`."""
        attention = reduce(image.cls_attention(self.layer)[0], "heads tokens -> tokens", "sum").double()
        if self.statistic == "top_count":
            number = int(attention.numel() * (1 - self.base_share))
            candidates = torch.ones_like(attention, dtype=torch.bool)
            attention = top_of_image(attention[None], number, candidates[None])[0].double()
        coverage = base_tile_coverage(image.geometry.to(attention.device), self.region)
        return (coverage * attention).sum(dim=1)

    @property
    def is_exact(self) -> bool:
        """Whether the budget is spent in full."""
        return self.rounding == "largest_remainder"

    def allocate(
        self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor
    ) -> Sequence[int] | Tensor:
        """Divide the budget by visual content. If no sub-image draws attention, divide it by capacity."""
        if not image.geometry.sub_images:
            return [min(total, capacity[0])]
        content = self.content(image)
        if self.rounding == "largest_remainder":
            limits = as_device_tensor(tuple(capacity), content.device)
            content = torch.where(content.sum() > 0, content, limits[1:])
            shares = (1 - self.base_share) * content / content.sum().clamp(min=torch.finfo(torch.float64).tiny)
            return apportion_tensor(total, torch.cat([shares.new_full((1,), self.base_share), shares]), capacity)
        base = min(int(total * self.base_share), capacity[0])
        remaining = min(total - base, sum(capacity[1:]))
        content_sum = content.cumsum(dim=0)[-1:]  # added in order, as in the release: rounding down depends on it
        shares = remaining * content / torch.where(content_sum > 0, content_sum, torch.inf)
        floored = torch.cat([shares.new_full((1,), base), shares.floor()]).long()
        return floored.minimum(as_device_tensor(tuple(capacity), content.device))


@dataclass
class ScoreMassAllocation(AllocationPolicy):
    """Divides the budget in proportion to the sum of the scores in each tile (EADP). Negative scores count as 0.

    Args:
        rounding: ``"largest_remainder"`` spends the budget exactly. ``"floor"`` rounds the budget of each tile down,
            grants at least one token per tile and redistributes nothing, as EADP's release does.
    """

    rounding: Literal["largest_remainder", "floor"] = "largest_remainder"

    @property
    def is_exact(self) -> bool:
        """Whether the budget is spent in full."""
        return self.rounding == "largest_remainder"

    def allocate(
        self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor
    ) -> Sequence[int] | Tensor:
        """Divide the budget by the sum of the scores. If all sums are 0, divide it by capacity."""
        limits = as_device_tensor(tuple(capacity), scores.device)
        if self.rounding == "floor" and total and len(capacity) > 1:
            sums = scores.clamp(min=0).sum(dim=1)  # float32 as in the release: rounding down depends on it
            return (sums / (sums.sum() + 1e-6) * total).long().clamp(min=1).minimum(limits)
        mass = scores.double().clamp(min=0).sum(dim=1)
        return apportion_tensor(total, torch.where(mass.sum() > 0, mass, limits), capacity)


@dataclass
class UniformAllocation(AllocationPolicy):
    """Divides the budget evenly over the tiles, and moves the surplus of full tiles to tiles with free capacity.

    Args:
        rounding: ``"largest_remainder"`` spends the budget exactly. ``"floor"`` grants ``total // tiles`` tokens to
            every tile and redistributes nothing.
    """

    rounding: Literal["largest_remainder", "floor"] = "largest_remainder"

    @property
    def is_exact(self) -> bool:
        """Whether the budget is spent in full."""
        return self.rounding == "largest_remainder"

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Divide the budget evenly."""
        if self.rounding == "floor":
            return [min(total // len(capacity), limit) for limit in capacity]
        return apportion(total, [1.0] * len(capacity), capacity)


@dataclass
class ProportionalAllocation(AllocationPolicy):
    """Divides the budget in proportion to the number of valid tokens in each tile."""

    @property
    def is_exact(self) -> bool:
        """Whether the budget is spent in full."""
        return True

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Divide the budget by capacity."""
        return apportion(total, [float(limit) for limit in capacity], capacity)


@dataclass
class GlobalTopAllocation(AllocationPolicy):
    """Ranks the tokens of all tiles in one pool; the budget of each tile follows from the ranking."""

    pools_tiles: ClassVar[bool] = True

    @property
    def is_exact(self) -> bool:
        """Whether the budget is spent in full."""
        return True

    def allocate(
        self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor
    ) -> Sequence[int] | Tensor:
        """Grant the pool the budget; without a pool, count the top tokens of the image in each tile."""
        if len(capacity) == 1:
            return [min(total, capacity[0])]
        return top_of_image(scores, total, scores > -torch.inf).sum(dim=1)


@dataclass
class BaseTileAllocation(AllocationPolicy):
    """Gives the whole budget to the base tile. The part above its capacity is not spent."""

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Grant the base tile the budget, up to its capacity."""
        return [min(total, capacity[0]), *(0 for _ in capacity[1:])]


@dataclass
class SubImagesAllocation(AllocationPolicy):
    """Gives the base tile no tokens, and divides the budget over the sub-images by their valid tokens.

    Args:
        pooled: rank the tokens of all sub-images in one pool instead.
    """

    pooled: bool = False

    def allocate(
        self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor
    ) -> Sequence[int] | Tensor:
        """Divide the budget over the sub-images.

        Raises:
            ValueError: if the image has no sub-images.
        """
        if not image.geometry.sub_images:
            raise ValueError(
                "SubImagesAllocation needs sub-images, but this image has only a base tile; use UniformAllocation"
            )
        if self.pooled:
            counts = top_of_image(scores[1:], total, scores[1:] > -torch.inf).sum(dim=1)
            return torch.cat([counts.new_zeros(1), counts])
        return [0, *apportion(total, [float(limit) for limit in capacity[1:]], capacity[1:])]
