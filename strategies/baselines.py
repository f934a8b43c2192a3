"""Baselines that every comparison needs: random, evenly spaced, base tile only, pooled tokens.

They read nothing but the layout. Random selection differs by seed: report several. Average pooling is what many models
train with; here it works for any number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.policies import AllocationPolicy, MergingPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import BaseTileAllocation, UniformAllocation
from tokenprune.strategies.components.merging import PooledGridMerging
from tokenprune.strategies.components.selection import RandomSelection, StrideSelection


@dataclass
class Random(ComponentReducer):
    """Random tokens of every tile, by seed.

    `Random.seeded` takes the seed.
    """

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=RandomSelection, kw_only=True)

    @classmethod
    def seeded(cls, budget: int | float | str | Budget = 0.2, seed: int = 0) -> Random:
        """Return random selection with a seed.

        Args:
            budget: tokens that may enter the LLM.
            seed: seed of the draw.
        """
        return cls(budget, selection=RandomSelection(seed))


@dataclass
class UniformStride(ComponentReducer):
    """Evenly spaced tokens of every tile, in row-major order."""

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=StrideSelection, kw_only=True)


@dataclass
class BaseTileOnly(ComponentReducer):
    """Evenly spaced tokens of the base tile alone.

    The budget is a ceiling, since the base tile may not hold it.
    """

    exact: ClassVar[bool] = False

    allocation: AllocationPolicy = field(default_factory=BaseTileAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=StrideSelection, kw_only=True)


@dataclass
class SpatialPooling(ComponentReducer):
    """Average pooling of every tile into as many cells as it may keep tokens."""

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=StrideSelection, kw_only=True)
    merging: MergingPolicy | None = field(default_factory=PooledGridMerging, kw_only=True)
