"""Base classes of the components of a strategy: allocation, selection, merging, relevance and output order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tokenprune.contracts import check_needs, require_tensor
from tokenprune.field_docs import inherit_field_docs
from tokenprune.image import EncodedImage, Signal
from tokenprune.literals import check_literal_fields
from tokenprune.selection import top_ranked


class Configurable:
    """Base of dataclasses whose fields are their whole configuration.

    The command line, YAML files and records name such an object by its class.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Complete the docstring by the options of the base classes."""
        super().__init_subclass__(**kwargs)
        if documentation := inherit_field_docs(cls):
            cls.__doc__ = documentation

    def __post_init__(self) -> None:
        """Check the options when the object is created.

        Raises:
            ValueError: if the value of a `Literal` field is not one of its values.
        """
        check_literal_fields(self)


@dataclass
class Component(Configurable):
    """A component of a strategy."""

    def __post_init__(self) -> None:
        """Check the options and the signals when the component is created."""
        super().__post_init__()
        check_needs(self)

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that this component reads."""
        return ()


@dataclass
class AllocationPolicy(Component, ABC):
    """Divides the budget of an image over its tiles."""

    pools_tiles: ClassVar[bool] = False
    """Whether all tiles share one budget; the selection then reads one sequence (`EncodedImage.flatten_tiles`)."""

    @property
    def is_exact(self) -> bool:
        """Whether the result always sums to ``min(total, sum(capacity))``; the kept tokens are then not counted."""
        return False

    @abstractmethod
    def allocate(
        self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor
    ) -> Sequence[int] | Tensor:
        """Return the number of tokens that each tile may keep.

        Args:
            image: the encoded image.
            total: number of tokens to divide.
            capacity: largest number of tokens that each tile can keep, `[tiles]`.
            scores: scores of the selection, `[tiles, tokens]`; `-inf` for tokens that may not be kept.

        Returns:
            Number of tokens per tile, base tile first, `[tiles]`; at most `capacity`.
        """


@dataclass
class SelectionPolicy(Component, ABC):
    """Selects tokens inside each tile."""

    @property
    def is_exact(self) -> bool:
        """Whether `pick` keeps exactly the budget of each tile; true for the default `pick`."""
        return type(self).pick is SelectionPolicy.pick

    @abstractmethod
    def score(self, image: EncodedImage) -> Tensor:
        """Return the score of each token, `[tiles, tokens]`; larger scores are kept first."""

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Return the kept tokens, bool `[tiles, tokens]`; by default the tokens with the largest scores of each tile.

        Args:
            image: the encoded image.
            scores: the result of `score`, `[tiles, tokens]`; `-inf` for tokens that are no candidates.
            budgets: number of tokens to keep in each tile, `[tiles]`.
            candidates: tokens that may be kept, bool `[tiles, tokens]`.
        """
        return top_ranked(scores, budgets) & candidates


@dataclass
class RelevancePolicy(Component, ABC):
    """Computes the relevance of each token to the question; allocations and selections can contain a policy."""

    @abstractmethod
    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the relevance of each token, `[tiles, tokens]`; larger values are more relevant."""


def compute_relevance(policy: RelevancePolicy, image: EncodedImage) -> Tensor:
    """Return the checked result of a relevance policy, `[tiles, tokens]`.

    Args:
        policy: the policy.
        image: the encoded image.

    Raises:
        TypeError: if the relevance is no tensor.
        ValueError: if it has another shape.
    """
    shape = (image.geometry.tiles, image.geometry.tokens)
    return require_tensor(policy.relevance(image), policy, "relevance", "[tiles, tokens]", shape, "real")


class Merged(NamedTuple):
    """The result of a merging policy.

    Args:
        kind: the tokens that merging adds to the picked tokens, `[tiles, tokens]`: 0 for no merged token, else the
            number of its kind (1, 2, ...). A merged token has the position of a token that was not picked.
        weights: weights of every output token as a weighted sum, `[tiles, tokens, sources]`. Row ``[tile, token]``
            belongs to the output token at that position; rows without an output token are ignored. Columns are the
            tokens of the same tile. Before the projector, an additional last column can be the CLS token of the tile.
    """

    kind: Tensor
    weights: Tensor


def identity_weights(picked: Tensor) -> Tensor:
    """Return weights that leave every token unchanged, `[tiles, tokens, tokens]`.

    Args:
        picked: any mask of the image, `[tiles, tokens]`.
    """
    return torch.eye(picked.shape[1], device=picked.device).repeat(len(picked), 1, 1)


@dataclass
class MergingPolicy(Component, ABC):
    """Merges dropped tokens into kept ones. Skipped if no token is dropped and none is reserved."""

    before_projector: ClassVar[bool] = False
    """Whether features are mixed before the projector instead of after it; then `needs` must contain the signal
    ``"projector_inputs"``."""

    @property
    def is_exact(self) -> bool:
        """Whether `merge` creates exactly the reserved number of tokens in each tile."""
        return False

    def reserve(self, budgets: Tensor, capacity: Tensor) -> Tensor:
        """Return the number of merged tokens in the budget of each tile, `[tiles]`.

        The selection picks the remaining tokens of the budget.

        Args:
            budgets: number of tokens granted to each tile, `[tiles]`.
            capacity: number of candidates in each tile, `[tiles]`; a tile drops nothing if its budget is as large.
        """
        return torch.zeros_like(budgets)

    @abstractmethod
    def merge(
        self, image: EncodedImage, scores: Tensor, picked: Tensor, reserved: Tensor, candidates: Tensor
    ) -> Merged:
        """Return the merged tokens of an image.

        Args:
            image: the encoded image.
            scores: scores of the selection, `[tiles, tokens]`; `-inf` for tokens that may not be kept.
            picked: the tokens that the selection picked, bool `[tiles, tokens]`.
            reserved: number of merged tokens to create in each tile, `[tiles]`.
            candidates: tokens that may be kept or merged into other tokens, bool `[tiles, tokens]`.
        """


@dataclass
class OrderPolicy(Component, ABC):
    """Defines the order in which the tokens of an image enter the LLM, in place of the packed order of the model."""

    @abstractmethod
    def rank(self, image: EncodedImage, scores: Tensor, kept: Tensor, kind: Tensor) -> Tensor:
        """Return sort keys, `[tiles, tokens]`: the smallest key comes first; equal keys keep the packed order.

        Args:
            image: the encoded image.
            scores: scores of the selection, `[tiles, tokens]`.
            kept: kept tokens including merged tokens, bool `[tiles, tokens]`.
            kind: the kind of each merged token (`Merged.kind`), 0 for tokens that are not merged, `[tiles, tokens]`.
        """
