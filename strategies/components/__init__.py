"""Exchangeable parts of strategies: allocation, selection, merging, relevance and output order."""

from tokenprune.strategies.components.allocation import (
    BaseTileAllocation,
    GlobalTopAllocation,
    ProportionalAllocation,
    ScoreMassAllocation,
    SubImagesAllocation,
    UniformAllocation,
    VisualContentAllocation,
)
from tokenprune.strategies.components.diversity import (
    AnchorsBuffersRegisters,
    ImportantThenDiverse,
    MaxMinDiversity,
    SaliencyCoverage,
)
from tokenprune.strategies.components.merging import ContextualMerging, MeanOfRest, NeighbourMerging, PooledCells
from tokenprune.strategies.components.order import ByScore, MergedLast
from tokenprune.strategies.components.relevance import AttentionRelevance, MeanRelevance, TextRelevance, TopRelevance
from tokenprune.strategies.components.second_look import TimmSaliency
from tokenprune.strategies.components.selection import RandomSelection, StrideSelection, TopAttention, TopNorm

__all__ = [
    "AnchorsBuffersRegisters",
    "AttentionRelevance",
    "BaseTileAllocation",
    "ByScore",
    "ContextualMerging",
    "GlobalTopAllocation",
    "ImportantThenDiverse",
    "MaxMinDiversity",
    "MeanOfRest",
    "MeanRelevance",
    "MergedLast",
    "NeighbourMerging",
    "PooledCells",
    "ProportionalAllocation",
    "RandomSelection",
    "SaliencyCoverage",
    "ScoreMassAllocation",
    "StrideSelection",
    "SubImagesAllocation",
    "TextRelevance",
    "TimmSaliency",
    "TopAttention",
    "TopNorm",
    "TopRelevance",
    "UniformAllocation",
    "VisualContentAllocation",
]
