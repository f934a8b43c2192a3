"""DivPrune: tokens that are as different from each other as possible, in one pool.

Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025.
Repository: vbdi/divprune, commit 799e2d9.

Max-min diversity on projected tokens with distance ``1 - cos``: the first pick is the token whose nearest neighbour is
farthest, each next one maximises the smallest distance to those picked. No attention is needed.

The release works on the packed sequence with newline tokens among the candidates and keeps ``round(ratio * length)`` of
them; here newlines follow the reducer's own option, so its exact sequence is not available as a preset. The greedy
itself equals the release's picks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.components import AllocationPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import GlobalTopAllocation
from tokenprune.strategies.components.diversity import MaxMinDiversity


@dataclass
class DivPrune(ComponentReducer):
    """Tokens as far from each other as possible, over all tiles in one pool."""

    published: ClassVar[str] = "CVPR 2025, arXiv 2503.02175"
    parity: ClassVar[str] = "its greedy: 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=GlobalTopAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=MaxMinDiversity, kw_only=True)
