"""Baselines for comparisons: random tokens, evenly spaced tokens, base tile only, average pooling.

They read only the layout. Results of random selection vary with the seed, so report several seeds. Many models are
trained with average pooling; here it supports any number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.policies import AllocationPolicy, MergingPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import BaseTileAllocation, UniformAllocation
from tokenprune.strategies.components.merging import PooledGridMerging
from tokenprune.strategies.components.selection import RandomSelection, StrideSelection


@dataclass
class Random(ComponentReducer):
    """Keeps random tokens of every tile.

    `Random.seeded` sets the seed.
    """

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=RandomSelection, kw_only=True)

    @classmethod
    def seeded(cls, budget: int | float | str | Budget = 0.2, seed: int = 0) -> Random:
        """Return the strategy with the given seed.

        Args:
            budget: number of tokens that may enter the LLM, or their share.
            seed: seed of the random generator.
        """
        return cls(budget, selection=RandomSelection(seed))


@dataclass
class UniformStride(ComponentReducer):
    """Keeps evenly spaced tokens of every tile, in row-major order."""

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=StrideSelection, kw_only=True)


@dataclass
class BaseTileOnly(ComponentReducer):
    """Keeps evenly spaced tokens of the base tile, and no sub-images.

    The budget is an upper bound, because it can exceed the capacity of the base tile.
    """

    exact: ClassVar[bool] = False

    allocation: AllocationPolicy = field(default_factory=BaseTileAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=StrideSelection, kw_only=True)


@dataclass
class SpatialPooling(ComponentReducer):
    """Averages the tokens of every tile into as many cells as its budget."""

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=StrideSelection, kw_only=True)
    merging: MergingPolicy | None = field(default_factory=PooledGridMerging, kw_only=True)
