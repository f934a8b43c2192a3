"""Selection policies: score the tokens of a tile and select the kept ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from tokenprune.geometry import RECENT_LAYOUTS
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import SelectionPolicy


def sample_mask(mask: Tensor, number: Tensor, spacing: str = "even") -> Tensor:
    """Return samples of the true entries of each row, bool `[rows, entries]`.

    Args:
        mask: bool `[rows, entries]`.
        number: number of samples of each row, `[rows, 1]`.
        spacing: ``"even"`` takes sample n at ``(2 n + 1) / (2 number)`` of the true entries, ``"step"`` takes every
            (count // number)-th true entry from the first.
    """
    count, n = mask.sum(dim=1, keepdim=True), torch.arange(mask.shape[1], device=mask.device)
    divisor = number.clamp(min=1)
    if spacing == "even":
        rank = ((2 * n + 1) * count).div(2 * divisor, rounding_mode="floor")
    else:
        rank = n * count.div(divisor, rounding_mode="floor").clamp(min=1)
    rank = torch.where((n < number) & (rank < count), rank, mask.shape[1])  # others: additional last place
    is_sample = mask.new_zeros(len(mask), mask.shape[1] + 1).scatter(1, rank, True)
    return mask & is_sample.gather(1, (mask.long().cumsum(dim=1) - 1).clamp(min=0))


@lru_cache(maxsize=RECENT_LAYOUTS)
def _cache_random_numbers(seed: int, tiles: int, tokens: int, device: str) -> Tensor:
    with torch.inference_mode(False):  # a later call may record gradients
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(tiles, tokens, generator=generator, dtype=torch.float32).to(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a generator is part of no graph
def _random_numbers(seed: int, tiles: int, tokens: int, device: str) -> Tensor:
    return _cache_random_numbers(seed, tiles, tokens, device)


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
        return _random_numbers(self.seed, image.geometry.tiles, image.geometry.tokens, str(image.device)).clone()


@dataclass
class StrideSelection(SelectionPolicy):
    """Keeps evenly spaced tokens, in row-major order of the valid tokens of a tile."""

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return True

    def score(self, image: EncodedImage) -> Tensor:
        """Return a low-discrepancy sequence, `[tiles, tokens]`: its top-k is nearly evenly spaced for every k.

        The values are multiples of the golden ratio modulo 1 (Weyl sequence). Only allocations that rank all tiles in
        one pool read them.
        """
        shape = (image.geometry.tiles, image.geometry.tokens)
        index = torch.arange(shape[0] * shape[1], dtype=torch.float64, device=image.device)
        return (index * ((5**0.5 - 1) / 2)).frac().float().view(shape)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep every (candidates / budget)-th candidate of each tile, the first after half a step."""
        return sample_mask(candidates, budgets[:, None])


@dataclass
class TopNormSelection(SelectionPolicy):
    """Keeps the tokens with the largest feature norm. Requires no attention."""

    def score(self, image: EncodedImage) -> Tensor:
        """Return the Euclidean norm of the features, `[tiles, tokens]`."""
        return torch.linalg.vector_norm(image.features.float(), dim=-1)
