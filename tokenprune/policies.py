"""The kinds of parts a strategy is made of: allocation, selection, merging, relevance and output order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokenprune.image import EncodedImage, Signal
from tokenprune.selection import top_per_tile


class Configurable:
    """A dataclass whose fields are its whole configuration: named by class on the command line, in YAML and records."""


@dataclass
class Component(Configurable):
    """A part of a strategy."""

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that this part reads."""
        return ()


@dataclass
class AllocationPolicy(Component, ABC):
    """Divides the budget of an image over its tiles."""

    pools_tiles: ClassVar[bool] = False
    """Whether tiles do not matter: the selection then sees one sequence (`EncodedImage.in_packed_order`)."""

    @abstractmethod
    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Return the tokens that each tile may keep.

        Args:
            image: the encoded image.
            total: tokens to divide.
            capacity: most tokens that each tile can keep, `[tiles]`.
            scores: the selection's scores, `[tiles, tokens]`; `-inf` where a token may not be kept.

        Returns:
            Tokens per tile, base tile first, `[tiles]`; never above `capacity`.
        """

    def weights(self, image: EncodedImage, capacity: Tensor, scores: Tensor) -> Tensor:
        """Return in which proportion the tiles share the budget, float64 `[tiles]`, without reading a number.

        Policies that can be part of one compiled graph (`ComponentReducer.mask`) write it.

        Args:
            image: the encoded image.
            capacity: most tokens that each tile can keep, `[tiles]`.
            scores: the selection's scores, `[tiles, tokens]`; `-inf` where a token may not be kept.
        """
        raise NotImplementedError(f"{self!r} does not say its shares in tensors, so it is part of no compiled graph")


@dataclass
class SelectionPolicy(Component, ABC):
    """Chooses tokens inside a tile."""

    @abstractmethod
    def score(self, image: EncodedImage) -> Tensor:
        """Return how much each token is worth, `[tiles, tokens]`; the larger the better."""

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Return the kept tokens, bool `[tiles, tokens]`. Methods that do more than rank scores override this.

        Args:
            image: the encoded image.
            scores: what `score` returned, `[tiles, tokens]`.
            budgets: tokens to keep in each tile, `[tiles]`.
            candidates: tokens that may be kept, bool `[tiles, tokens]`.
        """
        return top_per_tile(scores, budgets, candidates)


@dataclass
class RelevancePolicy(Component, ABC):
    """Says how much each token has to do with the question; allocations and selections can be given one."""

    @abstractmethod
    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the relevance of each token, `[tiles, tokens]`; the larger the better."""


class Merged(NamedTuple):
    """What a merging policy makes of the tokens that a selection picked.

    Args:
        made: which tokens merging adds to the picked ones, `[tiles, tokens]`: 0 for none, else the number of its kind
            (1, 2, ...). A merged token stands in the place of a token that was not picked.
        weights: every output token as a weighted sum, `[tiles, tokens, sources]`: row ``[tile, place]`` belongs to the
            token that stands there (other rows do not matter), columns are the tokens of the same tile. One more column
            is the CLS token of the tile, before the projector only.
    """

    made: Tensor
    weights: Tensor


def identity_weights(picked: Tensor) -> Tensor:
    """Return the weights of tokens that stay what they are, `[tiles, tokens, tokens]`.

    Args:
        picked: any mask of the image, `[tiles, tokens]`.
    """
    return torch.eye(picked.shape[1], device=picked.device).repeat(len(picked), 1, 1)


@dataclass
class MergingPolicy(Component, ABC):
    """Lets dropped tokens live on in others. If an image drops none and nothing is reserved, it is not asked."""

    before_projector: ClassVar[bool] = False
    """Whether features are mixed before the projector (declare the signal ``"projector_inputs"`` then) or after it."""

    def reserve(self, budgets: Tensor, room: Tensor) -> Tensor:
        """Return how many tokens of each tile's budget merging makes by itself; the selection picks the others.

        Args:
            budgets: tokens granted to each tile, `[tiles]`.
            room: candidates in each tile, `[tiles]`; a tile whose budget is as large drops nothing.
        """
        return torch.zeros_like(budgets)

    @abstractmethod
    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Return the merged tokens of an image.

        Args:
            image: the encoded image.
            scores: the selection's scores, `[tiles, tokens]`; `-inf` where a token may not be kept.
            picked: what the selection picked, bool `[tiles, tokens]`.
            reserved: tokens to make in each tile, `[tiles]`.
            candidates: tokens that may be kept, and be merged into others, bool `[tiles, tokens]`.
        """


@dataclass
class OrderPolicy(Component, ABC):
    """Says in which order the tokens of an image enter the LLM; without one they keep the model's packed order."""

    @abstractmethod
    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, made: Tensor) -> Tensor:
        """Return sort keys, `[tiles, tokens]`: the smallest comes first, equal ones keep the packed order.

        Args:
            image: the encoded image.
            scores: the selection's scores, `[tiles, tokens]`.
            kept: kept tokens, merged ones included, bool `[tiles, tokens]`.
            made: which of them merging made, by kind, 0 for none, `[tiles, tokens]`.
        """
