"""FEATHER: keeps attended tokens without the position bias of RoPE, and evenly spaced tokens at the first cut.

Paper: Endo et al., "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration", ICCV
2025, arXiv 2412.13180. Repository: markendo/FEATHER, commit c2a09b2.

``score = mean over heads of the attention of the last prompt token without position embeddings``, where the softmax
covers visual tokens only. Cuts at layers 8 and 16 of 32 keep 30 % and 9 %. At the first cut, every third token of every
third row is kept too. In the release these tokens come on top of the 30 %, and the grid is square. Repaired: they are
part of the budget, and tiles may have any grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.cuts import Cut
from tokenprune.decoder_reducer import DecoderReducer, ScheduledReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.reducer import ScoreReducer


@dataclass
class FEATHER(ScheduledReducer, ScoreReducer):
    """Keeps attended tokens without the position bias of RoPE, and evenly spaced tokens at the first cut.

    Args:
        stride: spacing of the evenly spaced tokens in rows and columns; 0 keeps none.
    """

    published: ClassVar[str] = "ICCV 2025, arXiv 2412.13180"

    schedule: tuple[tuple[int | float, int | float], ...] = field(default=((0.25, 0.3), (0.5, 0.09)), kw_only=True)
    stride: int = field(default=3, kw_only=True)

    @property
    def needs(self) -> Sequence[Signal]:
        """The attention of the last prompt token without position embeddings."""
        return (Signal("unrotated_attention"),)

    def at_cut(self, cut: Cut) -> DecoderReducer:
        """Return the strategy with a single cut; only the first cut keeps evenly spaced tokens."""
        reducer = self if cut == self.cuts[0] else replace(self, stride=0)
        return ScheduledReducer.at_cut(reducer, cut)

    def score(self, image: EncodedImage) -> Tensor:
        """Return the attention among visual tokens, plus 1 for evenly spaced tokens, `[tiles, tokens]`."""
        geometry = image.geometry.to(image.device)
        rows = image.unrotated_attention().masked_fill(~geometry.valid[:, None], 0)
        rows = rows / rows.amax(dim=(0, 2), keepdim=True).clamp(min=1e-30)
        scores = (rows / rows.sum(dim=(0, 2), keepdim=True).clamp(min=1e-30)).mean(dim=1)
        if not self.stride:
            return scores
        index, width = torch.arange(geometry.tokens, device=scores.device), geometry.token_grid[1]
        is_spaced = (index // width % self.stride == 0) & (index % width % self.stride == 0)
        return scores + is_spaced
