"""PyramidDrop: keeps the visual tokens that the last prompt token attends to most, fewer at each of three cuts.

Paper: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", CVPR 2025, arXiv 2410.17247. Repository: Cooperx521/PyramidDrop, commit 6444f30.

``score = mean over heads of the attention of the last prompt token``, computed with the weights of the layer of the cut
on all remaining tokens. Cuts at 1/4, 1/2 and 3/4 of the layers keep 50 %, 25 % and 12.5 %. The release counts
positions anew after a cut. Repaired: positions are preserved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tokenprune.decoder_reducer import ScheduledReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.reducer import ScoreReducer


@dataclass
class PyramidDrop(ScheduledReducer, ScoreReducer):
    """Keeps the visual tokens that the last prompt token attends to most, fewer at each of three cuts."""

    published: ClassVar[str] = "CVPR 2025, arXiv 2410.17247"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    schedule: tuple[tuple[int | float, int | float], ...] = field(
        default=((0.25, 0.5), (0.5, 0.25), (0.75, 0.125)), kw_only=True
    )

    @classmethod
    def release(cls, ratios: Sequence[float] = (0.5, 0.25, 0.125)) -> PyramidDrop:
        """Return PyramidDrop as published in code: positions are counted anew.

        Args:
            ratios: share of the tokens that remain after each cut.
        """
        layers = (0.25, 0.5, 0.75)
        return cls(positions="reindex", schedule=tuple(zip(layers, ratios, strict=True)))

    @property
    def needs(self) -> Sequence[Signal]:
        """The attention of the last prompt token in the layer of the cut."""
        return (Signal("asked_last_attention"),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return the mean attention over heads, `[tiles, tokens]`."""
        return image.asked_last_attention().mean(dim=1)
