"""FastV: keeps the visual tokens that the last prompt token attends to most, from an early layer on.

Paper: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764. Repository:
pkunlp-icler/FastV, commit d165972.

``score = mean over heads of the attention of the last prompt token in the layer before the cut``. In the release,
newline tokens compete with visual tokens. Repaired: the budget counts visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.decoder_reducer import DecoderReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.reducer import ScoreReducer


@dataclass
class FastV(DecoderReducer, ScoreReducer):
    """Keeps the visual tokens that the last prompt token attends to most, from one layer of the LLM on."""

    published: ClassVar[str] = "ECCV 2024, arXiv 2403.06764"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    @classmethod
    def release(cls, tokens: int = 288) -> FastV:
        """Return FastV as published in code.

        Args:
            tokens: number of tokens that remain, ``round(image_length * (1 - ratio))`` in the release.
        """
        return cls(tokens)

    @property
    def needs(self) -> Sequence[Signal]:
        """The attention of the last prompt token before the cut."""
        return (Signal("last_text_attention", "before"),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return the mean attention over heads, `[tiles, tokens]`."""
        return image.last_text_attention("before").mean(dim=1)
