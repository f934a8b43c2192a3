"""Exchangeable components of strategies: allocation, selection, merging, relevance and output order."""

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
    AnchorBufferRegisterSelection,
    ImportantThenDiverseSelection,
    MaxMinDiversitySelection,
    SaliencyCoverageSelection,
)
from tokenprune.strategies.components.merging import (
    ContextualMerging,
    MeanOfRestMerging,
    NeighborMerging,
    PooledGridMerging,
)
from tokenprune.strategies.components.order import MergedLastOrder, ScoreOrder
from tokenprune.strategies.components.relevance import (
    AttentionRelevance,
    MeanRelevance,
    TextRelevance,
    TopRelevanceSelection,
)
from tokenprune.strategies.components.saliency_model import TimmSaliency
from tokenprune.strategies.components.selection import (
    RandomSelection,
    StrideSelection,
    TopAttentionSelection,
    TopNormSelection,
)

__all__ = [
    "AnchorBufferRegisterSelection",
    "AttentionRelevance",
    "BaseTileAllocation",
    "ContextualMerging",
    "GlobalTopAllocation",
    "ImportantThenDiverseSelection",
    "MaxMinDiversitySelection",
    "MeanOfRestMerging",
    "MeanRelevance",
    "MergedLastOrder",
    "NeighborMerging",
    "PooledGridMerging",
    "ProportionalAllocation",
    "RandomSelection",
    "SaliencyCoverageSelection",
    "ScoreMassAllocation",
    "ScoreOrder",
    "StrideSelection",
    "SubImagesAllocation",
    "TextRelevance",
    "TimmSaliency",
    "TopAttentionSelection",
    "TopNormSelection",
    "TopRelevanceSelection",
    "UniformAllocation",
    "VisualContentAllocation",
]
