"""DART: keeps pivot tokens with large keys, and the tokens that repeat the pivots least.

Paper: Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP
2025, arXiv 2502.11494. Recorded from the copy of ZichenWen1/DART in Chenfei-Liao/VTC-Bench, commit 983e443.

Pivots are the visual tokens and the text tokens after the image with the largest L1 norm of the rotated keys in the
layer before the cut. Each pivot in turn adds the tokens whose hidden states have the lowest cosine to it. The release
visits the pivots in the order of a Python set of positions. Hidden states are those that enter the layer of the cut,
after the final norm of the LLM.

Repaired: pivots have the largest L2 norm, because the L1 norm of a rotated key depends on its position, and so on the
padding of a batch. Image pivots come first, then text pivots, each by descending norm. The budget is divided over the
pivots exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.decoder_reducer import DecoderReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.selection import Selection, top_of_image
from tokenprune.strategies.decoder._flat import unflatten_mask


def least_similar(hidden: Tensor, pivots: Tensor, image_pivots: Tensor, number: int) -> Tensor:
    """Return the mask of the image pivots and of the tokens with the lowest cosine to each pivot, bool `[tokens]`.

    Args:
        hidden: hidden states of the visual tokens, `[tokens, dim]`.
        pivots: hidden states of the pivots in the order of the visits, `[pivots, dim]`.
        image_pivots: indices of the visual tokens that are pivots; they are kept.
        number: number of tokens to keep.
    """
    kept = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    kept[image_pivots] = True
    shared, spare = divmod(number - len(image_pivots), max(1, len(pivots)))
    distance = -(F.normalize(pivots, dim=-1) @ F.normalize(hidden, dim=-1).T)
    for visit, row in enumerate(distance):
        kept = kept | top_of_image(row[None], shared + (visit < spare), ~kept[None])[0]
    return kept


@dataclass
class DART(DecoderReducer):
    """Keeps pivot tokens with large keys, and the tokens that repeat the pivots least.

    Args:
        image_pivots: number of pivots among the visual tokens.
        text_pivots: number of pivots among the text tokens after the image.
        norm: norm of the keys of each head: ``"l2"``, or ``"l1"`` as in the release.
        image_start: position of the first visual token in the prompt, to visit pivots in the order of the release, a
            Python set of positions; None visits them by descending norm.
    """

    published: ClassVar[str] = "EMNLP 2025, arXiv 2502.11494"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    image_pivots: int = field(default=4, kw_only=True)
    text_pivots: int = field(default=4, kw_only=True)
    norm: Literal["l1", "l2"] = field(default="l2", kw_only=True)
    image_start: int | None = field(default=None, kw_only=True)

    @classmethod
    def release(cls, tokens: int = 128, image_pivots: int = 4, text_pivots: int = 4, image_start: int = 35) -> DART:
        """Return DART as published in code.

        Args:
            tokens: number of tokens that the pivots add, rounded down to a multiple of the number of pivots.
            image_pivots: number of pivots among the visual tokens; they are kept in addition.
            text_pivots: number of pivots among the text tokens.
            image_start: position of the first visual token in the prompt.
        """
        pivots = image_pivots + text_pivots
        return cls(
            image_pivots + tokens // pivots * pivots,
            image_pivots=image_pivots,
            text_pivots=text_pivots,
            norm="l1",
            image_start=image_start,
        )

    @property
    def needs(self) -> Sequence[Signal]:
        """Keys of visual tokens and text in the layer before the cut, and their normed hidden states at the cut."""
        keys = (Signal("llm_keys", "before"), Signal("text_keys", "before"))
        return (*keys, Signal("normed_hidden"), Signal("normed_text_hidden"))

    def select(self, image: EncodedImage) -> Selection:
        """Keep the image pivots and the tokens that are least similar to the pivots."""
        geometry = image.geometry.to(image.device)
        hidden = image.normed_hidden().flatten(0, 1)[geometry.token_order]
        order = 1 if self.norm == "l1" else 2
        norms = image.llm_keys("before").norm(p=order, dim=3).sum(dim=1).flatten()[geometry.token_order]
        text = image.normed_text_hidden()
        text_norms = image.text_keys("before").norm(p=order, dim=2).sum(dim=0)

        def select_tokens(number: int) -> tuple[Tensor, Tensor]:
            image_pivots = norms.argsort(descending=True, stable=True)[: min(self.image_pivots, number)]
            text_pivots = text_norms.argsort(descending=True, stable=True)[: self.text_pivots]
            pivots = torch.cat([hidden[image_pivots], text[text_pivots]])
            if self.image_start is not None:
                text_start = self.image_start + len(hidden)
                positions = [self.image_start + index for index in image_pivots.tolist()]
                positions += [text_start + index for index in text_pivots.tolist()]
                pivots = pivots[[positions.index(position) for position in list(set(positions))]]
            kept = unflatten_mask(least_similar(hidden, pivots, image_pivots, number), geometry)
            return kept, kept.sum(dim=1)

        return self.select_within_budget(image, select_tokens)
