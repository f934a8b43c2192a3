"""VTC-CLS: keep the tokens that CLS attends to most, averaged over the last layers.

Paper: Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819.
Repository: THU-MIG/VTC-CLS, commit e41ac9b.

``score = sum over layers, from a start layer to the feature layer, of the mean over heads of CLS attention``; the top T
stay. The release asks for the start layer on its command line. Taken here: three layers that end with the feature
layer, which the paper is reported to find best (a secondary source, not seen in the paper itself); for the usual
feature layer, the last but one. The method is defined for one tile; here tiles share the budget evenly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.selection import TopAttentionSelection


@dataclass
class VTCCLS(ComponentReducer):
    """The tokens that CLS attends to most, averaged over the last layers.

    For any number of tiles and images.
    """

    published: ClassVar[str] = "arXiv 2412.05819"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=lambda: TopAttentionSelection(layer=[-4, -3, -2]), kw_only=True)
