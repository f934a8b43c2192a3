"""EViT: keeps the patches to which the CLS token attends most, at three layers of the vision tower.

Paper: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR
2022, arXiv 2202.07800. Repository: youweiliang/evit.

``score = mean over heads of the CLS attention of the layer``. Each step keeps 70 % of the patches, between attention
and MLP. The paper reduces layers 4, 7 and 10 of 12; here the schedule has relative depths. With `fuse`, the sum of the
dropped patches, weighted by their scores, becomes one patch at the end of the sequence, as in the paper.

Differences from the release: the fused patch is one of the patches that remain, and not an additional patch. It has the
position of the dropped patch with the largest score, where it enters the LLM if a visual token is one patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.encoder.patches import PatchGroups
from tokenprune.encoder_reducer import PatchDropReducer
from tokenprune.image import EncodedImage, Signal


@dataclass
class EViT(PatchDropReducer):
    """Keeps the patches to which the CLS token attends most, at three layers of the vision tower.

    Args:
        fuse: whether the dropped patches become one patch, which is the last of the patches that remain.
    """

    published: ClassVar[str] = "ICLR 2022, arXiv 2202.07800"

    schedule: tuple[tuple[int | float, int | float], ...] = field(
        default=((0.25, 0.7), (0.5, 0.49), (0.75, 0.343)), kw_only=True
    )

    fuse: bool = field(default=False, kw_only=True)

    @property
    def merges(self) -> bool:
        """The option `fuse`."""
        return self.fuse

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the layer."""
        return (Signal("cls_attention", "feature"),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return the mean attention over heads, `[tiles, patches]`."""
        return image.cls_attention("feature").mean(dim=1)

    def group(self, image: EncodedImage, number: int) -> PatchGroups:
        """Return the patches with the largest scores, and the group of the fused patch."""
        groups, patches = super().group(image, number), image.geometry.tokens
        if not self.fuse or number == patches:
            return groups
        scores = self.score(image)
        last = scores.gather(1, groups.kept).argmin(dim=1, keepdim=True)  # number of the fused patch in the sequence
        order = torch.arange(number, device=scores.device).expand_as(groups.kept)
        kept = groups.kept.gather(1, (order == last).long().argsort(dim=1, stable=True))
        group = torch.full_like(scores, number - 1, dtype=torch.long).scatter(1, kept, order)
        return PatchGroups(kept, group, scores.scatter(1, kept[:, :-1], 1.0))
