"""Relevance policies: how much each token has to do with the question, or with the image as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import RelevancePolicy, SelectionPolicy

SIGNS = {"opposite": -1.0, "aligned": 1.0}


@dataclass
class AttentionRelevance(RelevancePolicy):
    """What CLS attends to, mean over heads; needs no question.

    Args:
        layer: layer of the vision tower whose CLS attention is read.
    """

    layer: LayerChoice = "feature"

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the chosen layer."""
        return (Signal("cls_attention", self.layer),)

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return CLS attention, `[tiles, tokens]`."""
        return image.cls_attention(self.layer).mean(dim=1)


@dataclass
class TextRelevance(RelevancePolicy):
    """Likeness of tokens and question in the space that CLIP's towers share (CDPruner, TRIM).

    Args:
        layer: layer of the vision tower whose tokens are compared.
        likeness: ``"cosine"``, or ``"dot"`` without normalizing either side.
        sign: ``"opposite"``, as all published methods have it: patches of CLIP that show what a text says are *less*
            like it than the others; ``"aligned"`` for towers whose patches are not like that.
    """

    layer: LayerChoice = "feature"
    likeness: Literal["cosine", "dot"] = "cosine"
    sign: Literal["opposite", "aligned"] = "opposite"

    def __post_init__(self) -> None:
        """Check the options once."""
        for name, value, allowed in (("likeness", self.likeness, ("cosine", "dot")), ("sign", self.sign, tuple(SIGNS))):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}")

    @property
    def needs(self) -> Sequence[Signal]:
        """Tokens and question in the shared space."""
        return (Signal("aligned_features", self.layer), Signal("question"))

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the signed likeness, mean over the segments of a long question, `[tiles, tokens]`."""
        tokens, question = image.aligned_features(self.layer), image.question()
        if self.likeness == "cosine":
            tokens, question = F.normalize(tokens, dim=-1), F.normalize(question, dim=-1)
        likeness = SIGNS[self.sign] * (tokens.double() @ question.double().T).mean(dim=-1)
        largest = torch.finfo(torch.float32).max  # which a plain dot may exceed
        return likeness.clamp(-largest, largest).float()


@dataclass
class MeanRelevance(RelevancePolicy):
    """Likeness of tokens to their mean, or unlikeness; needs no attention and no question.

    What is unlike the mean is what the rest does not say: VidCom2 keeps such tokens of a frame and of a video
    (arXiv 2505.14454).

    Args:
        over: ``"tile"`` or ``"image"``: the mean of the valid tokens of each tile, or of all tiles together.
        sign: ``"opposite"`` prefers tokens that are unlike the mean, ``"aligned"`` typical ones.
    """

    over: Literal["tile", "image"] = "tile"
    sign: Literal["opposite", "aligned"] = "opposite"

    def __post_init__(self) -> None:
        """Check the options once."""
        for name, value, allowed in (("over", self.over, ("tile", "image")), ("sign", self.sign, tuple(SIGNS))):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}")

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the signed cosine to the mean, `[tiles, tokens]`."""
        features = image.features.float()
        valid = image.geometry.valid.to(features.device)[..., None]
        dims = (1,) if self.over == "tile" else (0, 1)
        mean = (features * valid).sum(dims, keepdim=True) / valid.sum(dims, keepdim=True).clamp(min=1)
        return SIGNS[self.sign] * F.cosine_similarity(features, mean, dim=-1)


def rescaled(values: Tensor, valid: Tensor, floor: float = 1e-6) -> Tensor:
    """Stretch the values of valid tokens to 0..1, a little above zero; without any difference they are all alike.

    Args:
        values: one number per token, `[tiles, tokens]`.
        valid: the tokens whose smallest and largest value count, bool `[tiles, tokens]`.
        floor: added to the smallest.
    """
    known = values[valid]
    if not known.numel():
        return torch.zeros_like(values)
    low, high = known.min(), known.max()
    spread = high - low
    return (values - low + floor) / spread if bool(spread > 0) else torch.ones_like(values)


@dataclass
class TopRelevanceSelection(SelectionPolicy):
    """Keep the tokens that have most to do with the question.

    Args:
        relevance: what says so.
    """

    relevance: RelevancePolicy = field(default_factory=TextRelevance)

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the relevance."""
        return self.relevance.needs

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, `[tiles, tokens]`."""
        return self.relevance.relevance(image)
