"""Exchangeable parts of strategies: allocation policies and selection policies."""

from tokenprune.strategies.components.allocation import (
    BaseTileOnly,
    GlobalTopAllocation,
    ProportionalAllocation,
    SubImagesOnly,
    UniformAllocation,
    VisualContentAllocation,
)
from tokenprune.strategies.components.diversity import (
    AnchorsBuffersRegisters,
    ImportantThenDiverse,
    MaxMinDiversity,
    SaliencyCoverage,
)
from tokenprune.strategies.components.selection import RandomSelection, TopAttention, TopNorm, UniformStride

__all__ = [
    "AnchorsBuffersRegisters",
    "BaseTileOnly",
    "GlobalTopAllocation",
    "ImportantThenDiverse",
    "MaxMinDiversity",
    "ProportionalAllocation",
    "RandomSelection",
    "SaliencyCoverage",
    "SubImagesOnly",
    "TopAttention",
    "TopNorm",
    "UniformAllocation",
    "UniformStride",
    "VisualContentAllocation",
]
