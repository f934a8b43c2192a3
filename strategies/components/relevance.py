"""Relevance policies: score each token by its relation to the question or to the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import RelevancePolicy, SelectionPolicy, compute_relevance

SIGNS = {"opposite": -1.0, "aligned": 1.0}


@dataclass
class AttentionRelevance(RelevancePolicy):
    """Uses CLS attention, mean over heads, as the relevance. Requires no question.

    Args:
        layer: layer of the vision tower whose CLS attention is read.
    """

    layer: LayerChoice = "feature"

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the configured layer."""
        return (Signal("cls_attention", self.layer),)

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return CLS attention, `[tiles, tokens]`."""
        return image.cls_attention(self.layer).mean(dim=1)


@dataclass
class TextRelevance(RelevancePolicy):
    """Computes the similarity of tokens and question in the shared embedding space of CLIP (CDPruner, TRIM).

    Args:
        layer: layer of the vision tower whose tokens are compared.
        likeness: ``"cosine"``, or ``"dot"`` for the dot product of unnormalized vectors.
        sign: ``"opposite"`` negates the similarity, as all published methods do: CLIP patches that show the content of
            a text are *less* similar to it than other patches. ``"aligned"`` is for towers without this property.
    """

    layer: LayerChoice = "feature"
    likeness: Literal["cosine", "dot"] = "cosine"
    sign: Literal["opposite", "aligned"] = "opposite"

    @property
    def needs(self) -> Sequence[Signal]:
        """The tokens and the question in the shared embedding space."""
        return (Signal("aligned_features", self.layer), Signal("question"))

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the signed similarity, mean over the segments of a long question, `[tiles, tokens]`."""
        tokens, question = image.aligned_features(self.layer), image.question()
        if self.likeness == "cosine":
            tokens, question = F.normalize(tokens, dim=-1), F.normalize(question, dim=-1)
        similarity = SIGNS[self.sign] * (tokens.double() @ question.double().T).mean(dim=-1)
        largest = torch.finfo(torch.float32).max  # an unnormalized dot product can exceed it
        return similarity.clamp(-largest, largest).float()


@dataclass
class MeanRelevance(RelevancePolicy):
    """Computes the signed cosine similarity of tokens to their mean. Requires no attention and no question.

    Tokens that differ from the mean carry information that other tokens lack. VidCom2 keeps such tokens of a frame and
    of a video (arXiv 2505.14454).

    Args:
        over: tokens of the mean: the valid tokens of each ``"tile"``, or of all tiles of the ``"image"``.
        sign: ``"opposite"`` prefers tokens that differ from the mean; ``"aligned"`` prefers tokens similar to the mean.
    """

    over: Literal["tile", "image"] = "tile"
    sign: Literal["opposite", "aligned"] = "opposite"

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the signed cosine similarity to the mean, `[tiles, tokens]`."""
        features = image.features.float()
        valid = image.geometry.valid.to(features)[:, None]
        mean = valid @ features  # the length of the mean has no influence; products need no copy of all features
        if self.over == "image":
            mean = mean.sum(dim=0, keepdim=True).expand_as(mean)
        length = features.norm(dim=-1) * mean.norm(dim=-1)
        return SIGNS[self.sign] * (features @ mean.mT).squeeze(-1) / length.clamp(min=1e-8)


def rescale_to_unit(values: Tensor, valid: Tensor, floor: float = 1e-6) -> Tensor:
    """Rescale the values of valid tokens linearly to the range 0..1, `[tiles, tokens]`.

    If all valid values are equal, the result is 1 everywhere. If no token is valid, it is 0.

    Args:
        values: one number per token, `[tiles, tokens]`.
        valid: tokens whose minimum and maximum define the range, bool `[tiles, tokens]`.
        floor: added to the values before the division, so that the smallest result is above 0.
    """
    values = values if values.is_floating_point() else values.float()
    low = values.masked_fill(~valid, torch.inf).amin()
    spread = values.masked_fill(~valid, -torch.inf).amax() - low
    unit = torch.where(spread > 0, (values - low + floor) / spread, 1.0)
    return torch.where(valid.any(), unit, 0.0).to(values.dtype)


def standardize(values: Tensor, valid: Tensor) -> Tensor:
    """Return values minus their mean over valid tokens, divided by their standard deviation, `[tiles, tokens]`.

    The result is 0 for invalid tokens, and if all valid values are equal up to rounding.

    Args:
        values: one number per token, `[tiles, tokens]`.
        valid: tokens of mean and standard deviation, which are computed per tile, bool `[tiles, tokens]`.
    """
    values = values.float().masked_fill(~valid, 0)
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    centered = (values - values.sum(dim=1, keepdim=True) / count).masked_fill(~valid, 0)
    spread = (centered.square().sum(dim=1, keepdim=True) / count).sqrt()
    is_rounding = spread <= 1e-6 * values.abs().amax(dim=1, keepdim=True)
    return (centered / spread.clamp(min=torch.finfo(spread.dtype).tiny)).masked_fill(is_rounding, 0)


@dataclass
class TopRelevanceSelection(SelectionPolicy):
    """Keeps the tokens with the largest relevance to the question.

    Args:
        relevance: relevance policy that scores the tokens.
    """

    relevance: RelevancePolicy = field(default_factory=TextRelevance)

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the relevance policy."""
        return self.relevance.needs

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, `[tiles, tokens]`."""
        return compute_relevance(self.relevance, image)
