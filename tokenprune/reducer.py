"""Strategies: the abstract reducer and the two bases that most strategies derive from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenprune.budget import Budget, as_budget
from tokenprune.components import AllocationPolicy, SelectionPolicy
from tokenprune.image import SEPARATOR, EncodedImage, Signal
from tokenprune.selection import Newlines, Selection, kept_separators, top_of_image

if TYPE_CHECKING:
    from tokenprune.attach import Run


@dataclass
class TokenReducer(ABC):
    """A token reduction strategy: an encoded image in, a selection of its tokens out.

    An instance is its own configuration: its fields are what the command line, YAML files and W&B show. Subclass it,
    write `select`, and declare in `needs` what `select` reads beyond the features.

    Args:
        budget: tokens that may enter the LLM: a float is a ratio, an int a count, `Budget` says more.
        positions: position ids of what stays: ``"reindex"`` (0, 1, 2, ...) or ``"preserve"`` (as in the full prompt).
        newlines: learned row separators: ``"keep_rows"`` keeps those of rows that keep a token, ``"drop"``, ``"keep"``.
    """

    budget: int | float | Budget = 0.2
    positions: Literal["reindex", "preserve"] = "reindex"
    newlines: Newlines = "keep_rows"

    def __post_init__(self) -> None:
        """Check the options once, so that a typo does not wait for the first image."""
        as_budget(self.budget)
        for name, value, allowed in (
            ("positions", self.positions, ("reindex", "preserve")),
            ("newlines", self.newlines, ("keep_rows", "drop", "keep")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}")

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that `select` reads; features and geometry are always there."""
        return ()

    @abstractmethod
    def select(self, image: EncodedImage) -> Selection:
        """Choose the tokens of one image. A pure function of the image and the fields of this instance."""

    def reduce(self, image: EncodedImage) -> Selection:
        """Return a checked and complete selection: what `select` chose, with its newline tokens.

        Raises:
            ValueError: if `select` answered with a mask of the wrong shape or type, or kept tokens that are not valid.
        """
        selection = self.select(image)
        geometry, kept = image.geometry, selection.kept
        if kept.dtype != torch.bool or tuple(kept.shape) != (geometry.tiles, geometry.tokens):
            raise ValueError(
                f"{type(self).__name__}.select must return a bool mask of shape [{geometry.tiles}, {geometry.tokens}] "
                f"(tiles, tokens), not {kept.dtype} {list(kept.shape)}"
            )
        if bool((kept & ~geometry.valid.to(kept.device)).any()):
            raise ValueError(
                f"{type(self).__name__}.select kept tokens that the model's own unpadding removes; "
                "choose among image.geometry.valid"
            )
        separators = selection.separators
        if separators is None:
            separators = kept_separators(geometry, kept, self.newlines)
        return replace(selection, separators=separators, pixels=image.pixels)

    def __call__(self, model: Any) -> AbstractContextManager[Run]:
        """Attach the strategy to a live model: ``with reducer(model) as run: model.generate(...)``.

        Args:
            model: an unmodified transformers model of a supported family.

        Raises:
            TypeError: if no adapter knows the model.
            ValueError: if the adapter does not provide a needed signal.
            RuntimeError: if the model already has a reducer, or (on leaving) if no image was ever reduced.
        """
        from tokenprune.attach import attach

        return attach(model, self)

    def within_budget(
        self,
        image: EncodedImage,
        choose: Callable[[int], tuple[Tensor, list[int]]],
        scores: Tensor | None = None,
        limit: int | None = None,
    ) -> Selection:
        """Return the selection that spends the budget exactly.

        With free newlines this is one call of ``choose``. Counted newlines depend on the choice: then the largest
        number of tokens is sought that fits together with its newlines; a unit that is left over keeps the newline of
        an emptied row.

        Args:
            image: the encoded image.
            choose: from a number of tokens to kept tokens (bool `[tiles, tokens]`) and tokens granted per tile.
            scores: scores to show with the selection, `[tiles, tokens]`.
            limit: most tokens that ``choose`` can be given; the number of valid tokens if left out.
        """
        geometry, budget = image.geometry, as_budget(self.budget)
        asked = budget.asked(geometry)
        limit = int(geometry.valid.sum()) if limit is None else limit
        number = min(asked, limit)
        kept, granted = choose(number)
        separators = kept_separators(geometry, kept, self.newlines)
        if budget.newlines == "counted":

            def cost(kept: Tensor) -> int:
                return int(kept.sum()) + int(kept_separators(geometry, kept, self.newlines).sum())

            while number > 0 and cost(kept) > asked:
                number = max(0, number - (cost(kept) - asked))
                kept, granted = choose(number)
            while number < min(asked, limit):
                more, more_granted = choose(number + 1)
                if cost(more) > asked:
                    break
                number, kept, granted = number + 1, more, more_granted
            separators = kept_separators(geometry, kept, self.newlines)
            if self.newlines == "keep_rows":
                spare = max(0, asked - cost(kept))
                separators = separators.clone()
                separators[(~separators).nonzero()[:spare, 0]] = True
            elif self.newlines == "keep" and int(separators.sum()) > asked:
                separators = torch.arange(geometry.separators, device=separators.device) < asked
        return Selection(
            geometry,
            kept,
            asked,
            budgets=torch.tensor(granted),
            scores=scores,
            separators=separators,
        )


def checked_scores(source: ScoreReducer | SelectionPolicy, image: EncodedImage, candidates: Tensor) -> Tensor:
    """Return the scores of ``source`` in float32 with `-inf` at tokens that are no candidates.

    Raises:
        ValueError: if the shape is wrong or a candidate has a score that is not a number.
    """
    scores = source.score(image)
    if scores.shape != candidates.shape:
        raise ValueError(
            f"{type(source).__name__}.score must return [tiles, tokens] = {list(candidates.shape)}, "
            f"not {list(scores.shape)}"
        )
    if bool((scores.isnan() & candidates).any()):
        raise ValueError(f"{type(source).__name__}.score returned NaN; a score must be a number for every valid token")
    finite = scores.float().clamp(min=torch.finfo(torch.float32).min)  # -inf is left to tokens that are no candidates
    return finite.masked_fill(~candidates, -torch.inf)


@dataclass
class ScoreReducer(TokenReducer):
    """A strategy that is one score per token: the best tokens of the whole image stay, whatever their tile."""

    @abstractmethod
    def score(self, image: EncodedImage) -> Tensor:
        """Return how much each token is worth, `[tiles, tokens]`; the larger the better."""

    def select(self, image: EncodedImage) -> Selection:
        """Keep the tokens with the largest scores."""
        valid = image.geometry.valid.to(image.features.device)
        scores = checked_scores(self, image, valid)

        def choose(number: int) -> tuple[Tensor, list[int]]:
            kept = top_of_image(scores, number, valid)
            return kept, kept.sum(dim=1).tolist()

        return self.within_budget(image, choose, scores)


@dataclass
class ComponentReducer(TokenReducer):
    """A strategy made of exchangeable parts: an allocation divides the budget over the tiles, a selection spends it.

    Args:
        allocation: tokens per tile.
        selection: which tokens in a tile.
        padding: ``"exclude"`` never pays for tokens that the model's unpadding removes; ``"ignore"`` chooses as if they
            were there and loses them afterwards, as published code does: then fewer tokens are kept than asked.
    """

    allocation: AllocationPolicy = field(kw_only=True)
    selection: SelectionPolicy = field(kw_only=True)
    padding: Literal["exclude", "ignore"] = field(default="exclude", kw_only=True)

    def __post_init__(self) -> None:
        """Check the options once."""
        super().__post_init__()
        if self.padding not in ("exclude", "ignore"):
            raise ValueError(f"padding={self.padding!r} is not known; use 'exclude' or 'ignore'")
        for name, kind in (("allocation", AllocationPolicy), ("selection", SelectionPolicy)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r} is no {kind.__name__}; give an instance of one")

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that the parts read."""
        return (*self.allocation.needs, *self.selection.needs)

    def select(self, image: EncodedImage) -> Selection:
        """Divide the budget over the tiles, then choose inside each tile (or in the one pool of all tiles)."""
        if self.allocation.ignores_tiles and image.geometry.sub_images:
            return self._select_pooled(image)
        valid = image.geometry.valid.to(image.features.device)
        candidates = torch.ones_like(valid) if self.padding == "ignore" else valid
        scores = checked_scores(self.selection, image, candidates)
        capacity = candidates.sum(dim=1).tolist()

        def choose(number: int) -> tuple[Tensor, list[int]]:
            granted = self.allocation.allocate(image, number, capacity, scores)
            kept = self.selection.pick(image, scores, torch.tensor(granted, device=scores.device), candidates)
            return kept & valid, granted

        return self.within_budget(image, choose, scores, limit=sum(capacity))

    def _select_pooled(self, image: EncodedImage) -> Selection:
        """Choose in the sequence of all valid tokens, and put the choice back at its tiles."""
        pool, geometry = image.in_packed_order(), image.geometry
        places = geometry.packed[geometry.packed != SEPARATOR].to(image.features.device)
        everyone = torch.ones(1, len(places), dtype=torch.bool, device=places.device)
        scores = checked_scores(self.selection, pool, everyone)

        def at_tiles(values: Tensor, fill: float) -> Tensor:
            flat = values.new_full((geometry.tiles * geometry.tokens,), fill)
            flat[places] = values[0]
            return flat.view(geometry.tiles, geometry.tokens)

        def choose(number: int) -> tuple[Tensor, list[int]]:
            budget = self.allocation.allocate(pool, number, [len(places)], scores)
            kept = self.selection.pick(pool, scores, torch.tensor(budget, device=places.device), everyone)
            kept = at_tiles(kept, False)
            return kept, kept.sum(dim=1).tolist()

        return self.within_budget(image, choose, at_tiles(scores, -torch.inf))
