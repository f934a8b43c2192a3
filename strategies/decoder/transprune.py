"""TransPrune: keeps the visual tokens that layers change most and that the text attends to.

Repository: liaolea/TransPrune, commit c9e8284 (CVPR 2026).

``score = transition / sum + attention / sum``. The transition of a token is summed over the layers from 6 to the cut
(see `EncodedImage.token_transition`). The attention is the mean over heads and text tokens after the image, computed
with the weights of the layer of the cut. Cuts at layers 7, 9 and 12 keep 87.5 %, 62.5 % and 12.5 %. The release counts
positions anew and supports batch size 1. Repaired: positions are preserved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tokenprune.decoder_reducer import ScheduledReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LLMLayerChoice
from tokenprune.reducer import ScoreReducer


@dataclass
class TransPrune(ScheduledReducer, ScoreReducer):
    """Keeps the visual tokens that layers change most and that the text attends to, at three cuts.

    Args:
        first_layer: first layer whose transition counts. A cut at a relative depth reads the layer before it only.
        last_layer: last layer whose transition counts.
    """

    published: ClassVar[str] = "CVPR 2026"

    schedule: tuple[tuple[int | float, int | float], ...] = field(
        default=((7, 0.875), (9, 0.625), (12, 0.125)), kw_only=True
    )
    first_layer: int = field(default=6, kw_only=True)
    last_layer: int = field(default=11, kw_only=True)

    @property
    def transition_layers(self) -> LLMLayerChoice:
        """The layers before the cut whose transition counts."""
        if isinstance(self.layer, float) or self.layer <= self.first_layer:
            return "before"
        return list(range(self.first_layer, min(self.layer, self.last_layer + 1)))

    @property
    def needs(self) -> Sequence[Signal]:
        """The transitions of layers before the cut, and the attention of the text in the layer of the cut."""
        return (Signal("token_transition", self.transition_layers), Signal("asked_text_attention"))

    def score(self, image: EncodedImage) -> Tensor:
        """Return the sum of both normalized terms, `[tiles, tokens]`."""
        valid = image.geometry.to(image.device).valid
        terms = (image.token_transition(self.transition_layers)[..., 0], image.asked_text_attention().mean(dim=(1, 2)))
        shares = [(term / term.amax().clamp(min=1e-30)).masked_fill(~valid, 0) for term in terms]
        return shares[0] / shares[0].sum().clamp(min=1e-30) + shares[1] / shares[1].sum().clamp(min=1e-30)
