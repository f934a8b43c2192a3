"""Exchangeable components of strategies: allocation, selection, merging, relevance and output order.

Components that belong to one published method are defined in its file, and imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from tokenprune.strategies.cdpruner import ConditionalDiversitySelection as ConditionalDiversitySelection
    from tokenprune.strategies.eadp import DenseTextRelevance as DenseTextRelevance
    from tokenprune.strategies.eadp import FacilityLocationSelection as FacilityLocationSelection
    from tokenprune.strategies.globalcom2 import GuidedAllocation as GuidedAllocation
    from tokenprune.strategies.globalcom2 import LocalGlobalSelection as LocalGlobalSelection
    from tokenprune.strategies.hero import EarlyLateAttentionSelection as EarlyLateAttentionSelection
    from tokenprune.strategies.hero import SaliencyRelevanceAllocation as SaliencyRelevanceAllocation
    from tokenprune.strategies.holov import StripedAttentionSelection as StripedAttentionSelection
    from tokenprune.strategies.holov import StripeOrder as StripeOrder
    from tokenprune.strategies.prumerge import ImportantThenSpacedSelection as ImportantThenSpacedSelection
    from tokenprune.strategies.prumerge import OutlierThenSpacedSelection as OutlierThenSpacedSelection
    from tokenprune.strategies.prumerge import ReleasedCountAllocation as ReleasedCountAllocation
    from tokenprune.strategies.prumerge import ReleasedOrder as ReleasedOrder
    from tokenprune.strategies.question_first import QuestionFirstSelection as QuestionFirstSelection
    from tokenprune.strategies.tops import OptimalPreservationSelection as OptimalPreservationSelection
    from tokenprune.strategies.trim import OutlierAllocation as OutlierAllocation
    from tokenprune.strategies.visionzip import ClsDominantContextualOrder as ClsDominantContextualOrder

_METHODS = {
    "ClsDominantContextualOrder": "visionzip",
    "ConditionalDiversitySelection": "cdpruner",
    "QuestionFirstSelection": "question_first",
    "DenseTextRelevance": "eadp",
    "EarlyLateAttentionSelection": "hero",
    "FacilityLocationSelection": "eadp",
    "GuidedAllocation": "globalcom2",
    "ImportantThenSpacedSelection": "prumerge",
    "LocalGlobalSelection": "globalcom2",
    "OptimalPreservationSelection": "tops",
    "OutlierAllocation": "trim",
    "OutlierThenSpacedSelection": "prumerge",
    "ReleasedCountAllocation": "prumerge",
    "ReleasedOrder": "prumerge",
    "SaliencyRelevanceAllocation": "hero",
    "StripeOrder": "holov",
    "StripedAttentionSelection": "holov",
}
"""The file in `tokenprune.strategies` of each component that belongs to one published method."""

__all__ = [
    "AnchorBufferRegisterSelection",
    "AttentionRelevance",
    "BaseTileAllocation",
    "ClsDominantContextualOrder",
    "ConditionalDiversitySelection",
    "ContextualMerging",
    "DenseTextRelevance",
    "EarlyLateAttentionSelection",
    "FacilityLocationSelection",
    "GlobalTopAllocation",
    "GuidedAllocation",
    "ImportantThenDiverseSelection",
    "ImportantThenSpacedSelection",
    "LocalGlobalSelection",
    "MaxMinDiversitySelection",
    "MeanOfRestMerging",
    "MeanRelevance",
    "MergedLastOrder",
    "NeighborMerging",
    "OptimalPreservationSelection",
    "OutlierAllocation",
    "OutlierThenSpacedSelection",
    "PooledGridMerging",
    "ProportionalAllocation",
    "QuestionFirstSelection",
    "RandomSelection",
    "ReleasedCountAllocation",
    "ReleasedOrder",
    "SaliencyCoverageSelection",
    "SaliencyRelevanceAllocation",
    "ScoreMassAllocation",
    "ScoreOrder",
    "StrideSelection",
    "StripeOrder",
    "StripedAttentionSelection",
    "SubImagesAllocation",
    "TextRelevance",
    "TimmSaliency",
    "TopAttentionSelection",
    "TopNormSelection",
    "TopRelevanceSelection",
    "UniformAllocation",
    "VisualContentAllocation",
]


def __getattr__(name: str) -> Any:
    """Return a component of a published method after the import of its file."""
    if name not in _METHODS:
        raise AttributeError(f"module 'tokenprune.strategies.components' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tokenprune.strategies.{_METHODS[name]}"), name)
