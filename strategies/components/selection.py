"""Selection policies: score the tokens of a tile and select the kept ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import SelectionPolicy


def evenly_spaced_indices(length: int, number: int) -> Tensor:
    """Return evenly spaced indices of a sequence, the first after half a step, int64 `[number]`."""
    return (2 * torch.arange(number) + 1) * length // (2 * max(number, 1))


@dataclass
class TopAttentionSelection(SelectionPolicy):
    """Keeps the tokens with the largest CLS attention (HiRED, arXiv 2408.10945, Eq. 2).

    Args:
        layer: layer of the vision tower whose CLS attention is read.
        heads: how heads are combined: ``"sum"``, ``"max"``, or the index of a single head. ``"joint"`` computes one
            attention from the concatenated queries and keys of all heads.
    """

    layer: LayerChoice = "feature"
    heads: Literal["sum", "max", "joint"] | int = "sum"

    def __post_init__(self) -> None:
        """Check the options when the component is created."""
        super().__post_init__()
        if self.heads not in ("sum", "max", "joint") and (
            not isinstance(self.heads, int) or isinstance(self.heads, bool)
        ):
            raise ValueError(f"heads={self.heads!r} is not known; use 'sum', 'max', 'joint' or the index of a head")

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the configured layer."""
        return (Signal("joint_attention" if self.heads == "joint" else "cls_attention", self.layer),)

    def score(self, image: EncodedImage) -> Tensor:
        """Return CLS attention, heads combined, `[tiles, tokens]`.

        Raises:
            ValueError: if the vision tower has no head of this index.
        """
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
    """Keeps random tokens. Images of equal layout keep the same tokens, so results do not depend on batching.

    Args:
        seed: seed of the random generator. Results vary with the seed, so report several.
    """

    seed: int = 0

    def score(self, image: EncodedImage) -> Tensor:
        """Return uniform random numbers, `[tiles, tokens]`."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (image.geometry.tiles, image.geometry.tokens)
        return torch.rand(shape, generator=generator).to(image.device)


@dataclass
class StrideSelection(SelectionPolicy):
    """Keeps evenly spaced tokens, in row-major order of the valid tokens of a tile."""

    def score(self, image: EncodedImage) -> Tensor:
        """Return a low-discrepancy sequence, `[tiles, tokens]`: its top-k is nearly evenly spaced for every k.

        The values are multiples of the golden ratio modulo 1 (Weyl sequence). Only allocations that rank all tiles in
        one pool read them.
        """
        index = torch.arange(image.geometry.tiles * image.geometry.tokens, dtype=torch.float64)
        weyl = (index * ((5**0.5 - 1) / 2)).frac().float()
        return weyl.view(image.geometry.tiles, image.geometry.tokens).to(image.device)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep every (candidates / budget)-th candidate of each tile, the first after half a step."""
        kept = torch.zeros_like(candidates)
        for tile, budget in enumerate(budgets.tolist()):
            indices = candidates[tile].nonzero()[:, 0]
            kept[tile, indices[evenly_spaced_indices(len(indices), budget).to(indices.device)]] = True
        return kept


@dataclass
class TopNormSelection(SelectionPolicy):
    """Keeps the tokens with the largest feature norm. Requires no attention."""

    def score(self, image: EncodedImage) -> Tensor:
        """Return the Euclidean norm of the features, `[tiles, tokens]`."""
        return torch.linalg.vector_norm(image.features.float(), dim=-1)
