"""V2Drop: keeps the visual tokens that the layer before the cut changes most.

Repository: xuyang-liu16/V2Drop, commit 219e03e (CVPR 2026).

``score = |hidden(K) - hidden(K - 1)|``, the L2 norm of the change by the layer before the cut. LLaVA-1.5: cuts at
layers 3, 17 and 22 of 32 keep 50 %, 50 % of the remaining tokens, and one token. Here all ratios refer to the tokens
that entered the LLM. The cut to one token is left out of the default, so that `budget` is the number of
tokens in the last layers.
The release drops tokens only in prompts of more than 576 positions, and assumes that the image spans positions 35 to
611. Repaired: any layout.
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
class V2Drop(ScheduledReducer, ScoreReducer):
    """Keeps the visual tokens that the layer before the cut changes most, at two cuts."""

    published: ClassVar[str] = "CVPR 2026"

    schedule: tuple[tuple[int | float, int | float], ...] = field(
        default=((3 / 32, 0.5), (17 / 32, 0.25)), kw_only=True
    )

    @property
    def needs(self) -> Sequence[Signal]:
        """The input of the layer before the cut."""
        return (Signal("llm_hidden", "before"),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return the norm of the change of each token, `[tiles, tokens]`."""
        return (image.features.float() - image.llm_hidden("before")).norm(dim=-1)
