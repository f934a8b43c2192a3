"""VTC-CLS: keeps the tokens with the largest CLS attention, averaged over the last layers.

Paper: Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819.
Repository: THU-MIG/VTC-CLS, commit e41ac9b.

``score = sum over layers, from a start layer to the feature layer, of the mean over heads of CLS attention``. The top T
tokens are kept. The release reads the start layer from its command line. This implementation uses three layers up to
the feature layer, for the usual feature layer (the second to last layer). According to a secondary source, the paper
reports the best results for three layers; this was not verified in the paper. The method is defined for one tile. Here
the budget is divided evenly over the tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.component_reducer import ComponentReducer
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.selection import TopAttentionSelection


@dataclass
class VTCCLS(ComponentReducer):
    """Keeps the tokens with the largest CLS attention, averaged over the last layers.

    Supports any number of tiles and images.
    """

    published: ClassVar[str] = "arXiv 2412.05819"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=lambda: TopAttentionSelection(layer=[-4, -3, -2]), kw_only=True)
