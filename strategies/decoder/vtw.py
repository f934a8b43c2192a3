"""VTW: withdraws all visual tokens from one layer of the LLM on.

Paper: Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", AAAI
2025. Repository: lzhxmu/VTW, commit a3d8cfc.

LLaVA-1.5-7B: no visual token remains from layer 15 of 32 on. The release searches the layer offline; here it is a
relative depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.decoder_reducer import DecoderReducer
from tokenprune.image import EncodedImage
from tokenprune.reducer import ScoreReducer


@dataclass
class VTW(DecoderReducer, ScoreReducer):
    """Withdraws all visual tokens from one layer of the LLM on; with a budget, the first tokens remain."""

    published: ClassVar[str] = "AAAI 2025"

    budget: int | float | str | Budget = 0
    layer: int | float = 15 / 32

    def score(self, image: EncodedImage) -> Tensor:
        """Return equal scores, `[tiles, tokens]`."""
        return image.features.new_zeros(image.features.shape[:2])
