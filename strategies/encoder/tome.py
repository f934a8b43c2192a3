"""ToMe: merges the most similar patches in every layer of the vision tower.

Paper: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461. Repository:
facebookresearch/ToMe, commit af95e4b.

Patches are compared by the head mean of their keys, and merged between attention and MLP. Attention adds
``log(size)`` to the logits of a merged patch (proportional attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.encoder_reducer import PatchMergeReducer
from tokenprune.image import EncodedImage, Signal


@dataclass
class ToMe(PatchMergeReducer):
    """Merges the most similar patches in every layer of the vision tower."""

    published: ClassVar[str] = "ICLR 2023, arXiv 2210.09461"
    parity: ClassVar[str] = "match_bipartite: 6/6 official cases"

    @property
    def needs(self) -> Sequence[Signal]:
        """The keys of the layer."""
        return (Signal("keys"),)

    def metric(self, image: EncodedImage) -> Tensor:
        """Return the head mean of the keys, `[tiles, patches, head_dim]`."""
        return image.keys("feature").mean(dim=1)
