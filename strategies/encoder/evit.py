"""EViT: keeps the patches to which the CLS token attends most, at three layers of the vision tower.

Paper: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR
2022, arXiv 2202.07800. Repository: youweiliang/evit.

``score = mean over heads of the CLS attention of the layer``. Each step keeps 70 % of the patches, between attention
and MLP. The paper reduces layers 4, 7 and 10 of 12; here the schedule has relative depths. The release adds the
attention-weighted sum of the dropped patches as one patch. Left out: this patch has no place in the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tokenprune.encoder_reducer import PatchDropReducer
from tokenprune.image import EncodedImage, Signal


@dataclass
class EViT(PatchDropReducer):
    """Keeps the patches to which the CLS token attends most, at three layers of the vision tower."""

    published: ClassVar[str] = "ICLR 2022, arXiv 2202.07800"

    schedule: tuple[tuple[int | float, int | float], ...] = field(
        default=((0.25, 0.7), (0.5, 0.49), (0.75, 0.343)), kw_only=True
    )

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the layer."""
        return (Signal("cls_attention", "feature"),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return the mean attention over heads, `[tiles, patches]`."""
        return image.cls_attention("feature").mean(dim=1)
