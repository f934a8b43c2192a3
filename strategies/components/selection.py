"""Selection policies: which tokens of a tile are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import SelectionPolicy


def evenly_spaced(length: int, number: int) -> Tensor:
    """Return evenly spaced places in a sequence, starting half a step in, `[number]`."""
    return (2 * torch.arange(number) + 1) * length // (2 * max(number, 1))


@dataclass
class TopAttentionSelection(SelectionPolicy):
    """Keep the tokens that CLS attends to most (HiRED, arXiv 2408.10945, Eq. 2).

    Args:
        layer: layer of the vision tower whose CLS attention is read.
        heads: how heads are combined: ``"sum"``, ``"max"``, the index of a single head, or ``"joint"`` for the
            attention of all heads taken as one wide head.
    """

    layer: LayerChoice = "feature"
    heads: Literal["sum", "max", "joint"] | int = "sum"

    def __post_init__(self) -> None:
        """Check the options once."""
        if self.heads not in ("sum", "max", "joint") and (
            not isinstance(self.heads, int) or isinstance(self.heads, bool)
        ):
            raise ValueError(f"heads={self.heads!r} is not known; use 'sum', 'max', 'joint' or the index of a head")

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the chosen layer."""
        return (Signal("joint_attention" if self.heads == "joint" else "cls_attention", self.layer),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return CLS attention, heads combined, `[tiles, tokens]`."""
        if self.heads == "joint":
            return image.joint_attention(self.layer)[:, 0]
        attention = image.cls_attention(self.layer)
        if isinstance(self.heads, int):
            if not -attention.shape[1] <= self.heads < attention.shape[1]:
                raise ValueError(f"heads={self.heads} is no head of a vision tower with {attention.shape[1]} heads")
            return attention[:, self.heads]
        return attention.sum(dim=1) if self.heads == "sum" else attention.amax(dim=1)


@dataclass
class RandomSelection(SelectionPolicy):
    """Keep tokens at random: the same ones for every image of a layout, so that batches change nothing.

    Args:
        seed: seed of the draw; report several.
    """

    seed: int = 0

    def score(self, image: EncodedImage) -> Tensor:
        """Return uniform random numbers, `[tiles, tokens]`."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (image.geometry.tiles, image.geometry.tokens)
        return torch.rand(shape, generator=generator).to(image.device)


@dataclass
class StrideSelection(SelectionPolicy):
    """Keep evenly spaced tokens, in row-major order of the valid tokens of a tile."""

    def score(self, image: EncodedImage) -> Tensor:
        """Return a sequence whose largest entries lie evenly spaced at any number, `[tiles, tokens]`.

        Only allocations that pool the tiles read it: multiples of the golden ratio modulo 1 (Weyl's sequence).
        """
        index = torch.arange(image.geometry.tiles * image.geometry.tokens, dtype=torch.float64)
        weyl = (index * ((5**0.5 - 1) / 2)).frac().float()
        return weyl.view(image.geometry.tiles, image.geometry.tokens).to(image.device)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep every (candidates / budget)-th candidate of each tile, starting half a step in."""
        kept = torch.zeros_like(candidates)
        for tile, budget in enumerate(budgets.tolist()):
            places = candidates[tile].nonzero()[:, 0]
            kept[tile, places[evenly_spaced(len(places), budget).to(places.device)]] = True
        return kept


@dataclass
class TopNormSelection(SelectionPolicy):
    """Keep the tokens with the largest feature norm; needs no attention."""

    def score(self, image: EncodedImage) -> Tensor:
        """Return the Euclidean norm of the features, `[tiles, tokens]`."""
        norms: Tensor = torch.linalg.vector_norm(image.features.float(), dim=-1)
        return norms
