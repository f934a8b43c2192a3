"""Allocation policies: how the budget of an image is divided over its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import reduce
from torch import Tensor

from tokenprune.budget import apportion
from tokenprune.image import EncodedImage, Signal, TileGeometry, region_coverage
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy
from tokenprune.selection import top_of_image


def base_tile_coverage(geometry: TileGeometry, region: str) -> Tensor:
    """Return which part of the base tile stands for each sub-image, `[sub_images, tokens]`.

    Args:
        geometry: the layout of the image.
        region: ``"exact"`` is the part of the image that a sub-image really shows, by area; ``"quadrant"`` cuts the
            base tile evenly into the tile grid; ``"stripe"`` cuts the flat row-major token sequence into equal runs, as
            HiRED's release does: horizontal stripes whatever the grid.

    Raises:
        ValueError: if the region is not known.
    """
    (rows, cols), device = geometry.tile_grid, geometry.regions.device
    if region == "exact":
        return region_coverage(geometry.regions, geometry.token_grid)
    if region == "quadrant":
        down, across = (torch.arange(number + 1, device=device) / number for number in (rows, cols))
        corners = [torch.cartesian_prod(down[part], across[part]).view(-1, 2) for part in (slice(-1), slice(1, None))]
        return region_coverage(torch.cat(corners, dim=1), geometry.token_grid)
    if region == "stripe":
        run = geometry.tokens // (rows * cols)
        if not run:
            raise ValueError(
                f"region='stripe' cannot cut {geometry.tokens} tokens into {rows * cols} stripes; use 'exact'"
            )
        stripe = torch.arange(geometry.tokens, device=device) // run
        return (stripe == torch.arange(rows * cols, device=device)[:, None]).float()
    raise ValueError(f"region={region!r} is not known; use 'exact', 'quadrant' or 'stripe'")


@dataclass
class VisualContentAllocation(AllocationPolicy):
    """HiRED: a fixed share for the base tile, the rest by the visual content that early CLS attention sees.

    ``N_0 = base_share * N`` and ``N_i = (N - N_0) * s_i / sum(s)``, where ``s_i`` is what the base tile's CLS
    attention, summed over heads, puts on the part that sub-image ``i`` covers (arXiv 2408.10945, Eq. 1 and Alg. 1).

    Args:
        base_share: share of the budget for the base tile (alpha), 0.0 to 1.0.
        layer: layer of the vision tower whose CLS attention is read.
        region: how sub-images map to the base tile; see `base_tile_coverage`.
        statistic: ``"mass"`` sums attention; ``"top_count"`` counts, as the release does, how many of the
            ``(1 - base_share) * tokens`` most attended base tokens fall on the sub-image.
        rounding: ``"largest_remainder"`` spends the budget exactly and lets full tiles spill over; ``"floor"`` rounds
            each tile down and redistributes nothing.
    """

    base_share: float = 0.5
    layer: LayerChoice = "first"
    region: Literal["exact", "quadrant", "stripe"] = "exact"
    statistic: Literal["mass", "top_count"] = "mass"
    rounding: Literal["largest_remainder", "floor"] = "largest_remainder"

    def __post_init__(self) -> None:
        """Check the options once."""
        if not 0.0 <= self.base_share <= 1.0:
            raise ValueError(f"base_share={self.base_share!r} must be from 0.0 to 1.0")
        for name, value, allowed in (
            ("region", self.region, ("exact", "quadrant", "stripe")),
            ("statistic", self.statistic, ("mass", "top_count")),
            ("rounding", self.rounding, ("largest_remainder", "floor")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}")

    @property
    def needs(self) -> Sequence[Signal]:
        """The base tile's CLS attention of the chosen layer."""
        return (Signal("cls_attention", self.layer),)

    def content(self, image: EncodedImage) -> Tensor:
        """Return the visual content ``s_i`` of each sub-image, float64 `[sub_images]`."""
        attention = reduce(image.cls_attention(self.layer)[0], "heads tokens -> tokens", "sum").double()
        if self.statistic == "top_count":
            number = int(attention.numel() * (1 - self.base_share))
            everywhere = torch.ones_like(attention, dtype=torch.bool)
            attention = top_of_image(attention[None], number, everywhere[None])[0].double()
        return base_tile_coverage(image.geometry, self.region).to(attention.device).double() @ attention

    def weights(self, image: EncodedImage, capacity: Tensor, scores: Tensor) -> Tensor:
        """Return the base tile's share and those of the sub-images; all alike if attention is on none of them."""
        if self.rounding == "floor":
            return super().weights(image, capacity, scores)
        if not image.geometry.sub_images:
            return torch.ones(1, dtype=torch.float64, device=capacity.device)
        content = self.content(image).to(capacity.device)
        content = torch.where(content.sum() > 0, content, capacity[1:])
        shares = (1 - self.base_share) * content / content.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return torch.cat([shares.new_full((1,), self.base_share), shares])

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Divide the budget by visual content."""
        if self.rounding == "largest_remainder":
            shares: list[float] = self.weights(image, torch.tensor(capacity), scores).tolist()
            return apportion(total, shares, capacity)
        content: list[float] = self.content(image).tolist() if image.geometry.sub_images else []
        mass = sum(content)
        base = min(int(total * self.base_share) if content else total, capacity[0])
        rest = min(total - base, sum(capacity[1:]))
        floored = [int(rest * part / mass) if mass else 0 for part in content]
        return [base, *(min(share, room) for share, room in zip(floored, capacity[1:], strict=True))]


@dataclass
class ScoreMassAllocation(AllocationPolicy):
    """Tokens in proportion to the sum of the selection's scores in each tile (EADP); negative scores count nothing.

    Args:
        rounding: ``"largest_remainder"`` spends the budget exactly; ``"floor"`` rounds each tile down but not below one
            token and redistributes nothing, as EADP's release does.
    """

    rounding: Literal["largest_remainder", "floor"] = "largest_remainder"

    def weights(self, image: EncodedImage, capacity: Tensor, scores: Tensor) -> Tensor:
        """Return the score mass of the tiles, or their size if there is none."""
        if self.rounding == "floor":
            return super().weights(image, capacity, scores)
        return self._mass(capacity, scores)

    def _mass(self, capacity: Tensor, scores: Tensor) -> Tensor:
        mass = scores.double().clamp(min=0).sum(dim=1).to(capacity.device)
        return torch.where(mass.sum() > 0, mass, capacity)

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Divide the budget by score mass."""
        if self.rounding == "floor" and total and len(capacity) > 1:
            sums = scores.clamp(min=0).sum(dim=1)  # float32, since it decides what is rounded down
            granted: list[int] = (sums / (sums.sum() + 1e-6) * total).long().clamp(min=1).tolist()
            return [min(share, room) for share, room in zip(granted, capacity, strict=True)]
        mass: list[float] = self._mass(torch.tensor(capacity), scores).tolist()
        return apportion(total, mass, capacity)


@dataclass
class UniformAllocation(AllocationPolicy):
    """The same number of tokens for every tile; what a small tile cannot take goes to the others.

    Args:
        rounding: ``"largest_remainder"`` spends the budget exactly; ``"floor"`` gives every tile ``total // tiles`` and
            redistributes nothing.
    """

    rounding: Literal["largest_remainder", "floor"] = "largest_remainder"

    def weights(self, image: EncodedImage, capacity: Tensor, scores: Tensor) -> Tensor:
        """Return the same for all tiles."""
        if self.rounding == "floor":
            return super().weights(image, capacity, scores)
        return torch.ones_like(capacity, dtype=torch.float64)

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Divide the budget evenly."""
        if self.rounding == "floor":
            return [min(total // len(capacity), room) for room in capacity]
        return apportion(total, [1.0] * len(capacity), capacity)


@dataclass
class ProportionalAllocation(AllocationPolicy):
    """Tokens in proportion to the valid tokens of each tile."""

    def weights(self, image: EncodedImage, capacity: Tensor, scores: Tensor) -> Tensor:
        """Return the tokens that each tile can keep."""
        return capacity.double()

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Divide the budget by tile size."""
        return apportion(total, [float(room) for room in capacity], capacity)


@dataclass
class GlobalTopAllocation(AllocationPolicy):
    """One pool and no tile budgets: each tile gets as many tokens as it has among the best of the whole image."""

    pools_tiles: ClassVar[bool] = True

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Count the best tokens of the image in each tile."""
        counts: list[int] = top_of_image(scores, total, scores > -torch.inf).sum(dim=1).tolist()
        return counts


@dataclass
class BaseTileAllocation(AllocationPolicy):
    """Everything for the base tile; what it cannot hold is not spent."""

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Give the base tile the whole budget."""
        return [min(total, capacity[0]), *(0 for _ in capacity[1:])]


@dataclass
class SubImagesAllocation(AllocationPolicy):
    """Nothing for the base tile; the sub-images share the budget in proportion to their valid tokens.

    Args:
        pooled: let the best tokens of all sub-images win in one pool, without tile budgets.
    """

    pooled: bool = False

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Give the sub-images the whole budget."""
        if not image.geometry.sub_images:
            raise ValueError(
                "SubImagesAllocation needs sub-images, but this image has only a base tile; use UniformAllocation"
            )
        if self.pooled:
            counts: list[int] = top_of_image(scores[1:], total, scores[1:] > -torch.inf).sum(dim=1).tolist()
            return [0, *counts]
        return [0, *apportion(total, [float(room) for room in capacity[1:]], capacity[1:])]
