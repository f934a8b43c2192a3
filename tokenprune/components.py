"""The parts a strategy is made of: allocation (tokens per tile) and selection (which tokens in a tile)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.image import EncodedImage, Signal
from tokenprune.selection import top_per_tile


@dataclass
class Component:
    """A part of a strategy. Its dataclass fields are its configuration."""

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that this part reads."""
        return ()


@dataclass
class AllocationPolicy(Component, ABC):
    """Divides the budget of an image over its tiles."""

    ignores_tiles: ClassVar[bool] = False
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
