"""Random patches at a layer of the vision tower, the baseline of this stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.encoder_reducer import PatchDropReducer
from tokenprune.image import EncodedImage


@dataclass
class RandomPatches(PatchDropReducer):
    """Keeps random patches of every tile from a layer of the vision tower on.

    Args:
        seed: seed of the random generator; the same tile keeps the same patches in every call.
    """

    seed: int = field(default=0, kw_only=True)

    def score(self, image: EncodedImage) -> Tensor:
        """Return random scores, `[tiles, patches]`."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(image.geometry.tokens, generator=generator).to(image.device).expand(image.geometry.tiles, -1)
