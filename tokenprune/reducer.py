"""Strategies: the abstract reducer and the two bases that most strategies derive from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.budget import Budget, apportion_tensor, as_budget, plain_budget
from tokenprune.image import ALIGNED_SIGNALS, NEWLINE, TEXT_SIGNALS, EncodedImage, Signal, TileGeometry
from tokenprune.policies import AllocationPolicy, Configurable, Merged, MergingPolicy, OrderPolicy, SelectionPolicy
from tokenprune.saliency import SOURCES, Attention, SaliencyModel
from tokenprune.selection import Newlines, Selection, kept_newlines, top_of_image, top_per_tile
from tokenprune.stages import ImageStage, ProjectorStage, Stage

if TYPE_CHECKING:
    from tokenprune.attach import Attachment


@dataclass
class TokenReducer(Configurable, ABC):
    """A token reduction strategy: an encoded image in, a selection of its tokens out.

    An instance is its own configuration: its fields are what the command line, YAML files and W&B show. Subclass it,
    write `select`, and declare in `needs` what `select` reads beyond the features.

    Args:
        budget: tokens that may enter the LLM: a float or ``"20%"`` is a ratio, an int a count; `Budget` has options.
        positions: position ids of what stays: ``"reindex"`` (0, 1, 2, ...) or ``"preserve"`` (as in the full prompt).
        newlines: learned row separators: ``"keep_rows"`` keeps those of rows that keep a token, ``"drop"``, ``"keep"``.
        text_model: for strategies that read the question: the CLIP checkpoint that the vision tower comes from, with
            its text tower; a folder, a hub id, or ``"mini"`` for that of the embedded model.
        attention: for strategies that read CLS attention: ``"auto"`` reads it where the vision tower has a CLS token,
            and else the attention that each token receives; ``"cls"``, ``"received"``, ``"pooling"`` (the probe of
            SigLIP's pooling head) fix the source. A `SaliencyModel` (`TimmSaliency`) computes it with another model.
        text_separators: text that separates rows or tiles inside an image, such as ``[IMG_BREAK]`` (learned newlines
            are no text, see `newlines`): ``"keep"`` leaves it in the prompt; ``"drop_empty"`` drops that of rows and
            tiles of which no token is kept. What opens and closes the whole image stays.
    """

    stage: ClassVar[Stage] = ProjectorStage()
    """Where the strategy acts: before the vision tower, or between it and the LLM."""
    exact: ClassVar[bool] = True
    """Whether the budget is always spent in full; for others it is a ceiling, and their docstring says why."""
    published: ClassVar[str] = ""
    """Where the method was published: venue and arXiv number."""
    parity: ClassVar[str] = ""
    """How many recorded cases of the official implementation are equal, and with what."""

    budget: int | float | str | Budget = 0.2
    positions: Literal["reindex", "preserve"] = "reindex"
    newlines: Newlines = "keep_rows"
    text_model: str | None = None
    attention: Attention | SaliencyModel = "auto"
    text_separators: Literal["keep", "drop_empty"] = "keep"

    def __post_init__(self) -> None:
        """Check the options once, so that a typo does not wait for the first image."""
        self.budget = plain_budget(self.budget)
        for name, value, allowed in (
            ("positions", self.positions, ("reindex", "preserve")),
            ("newlines", self.newlines, ("keep_rows", "drop", "keep")),
            ("text_separators", self.text_separators, ("keep", "drop_empty")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}")
        if not isinstance(self.attention, SaliencyModel) and self.attention not in ("auto", *SOURCES):
            words = ", ".join(map(repr, ("auto", *SOURCES)))
            raise ValueError(f"attention={self.attention!r} is not known; use one of {words}, or a SaliencyModel")

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that `select` reads; features and geometry are always there."""
        return ()

    @property
    def reads_question(self) -> bool:
        """Whether a needed signal comes from the question, or from the space that it shares with the image."""
        return any(signal.kind in TEXT_SIGNALS | ALIGNED_SIGNALS for signal in self.needs)

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
        self._check_mixing(selection)
        separators = selection.separators
        if separators is None:
            separators = kept_newlines(geometry, kept, self.newlines)
        return replace(selection, separators=separators, pixels=image.pixels)

    def _check_mixing(self, selection: Selection) -> None:
        """Raise a `ValueError` if mixing matrix or order do not fit the kept tokens."""
        geometry, kept = selection.geometry, selection.kept_tokens
        mixing, order = selection.mixing, selection.order
        total = geometry.tiles * geometry.tokens
        widths = {total, total + geometry.tiles} if selection.before_projector else {total}
        if mixing is not None and (mixing.dim() != 2 or len(mixing) != kept or mixing.shape[1] not in widths):
            raise ValueError(
                f"{type(self).__name__}.select returned a mixing matrix of {list(mixing.shape)}; with {kept} kept "
                f"tokens it must be [{kept}, {' or '.join(map(str, sorted(widths)))}] (kept, sources)"
            )
        if order is not None and not torch.equal(order.sort()[0].cpu(), torch.arange(kept)):
            raise ValueError(f"{type(self).__name__}.select returned an order that is no permutation of {kept} tokens")

    def __call__(
        self,
        model: Any,
        *,
        question: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        outputs: Literal["full", "reduced"] = "full",
        strict: bool = False,
    ) -> Attachment:
        """Return the context that attaches the strategy: ``with reducer(model) as run: model.generate(...)``.

        Args:
            model: an unmodified transformers model of a supported family, or a PEFT, compiled, or data parallel
                wrapper around one.
            question: for strategies that read the question: one for all prompts, or one per row of a batch. By default
                it is read from the prompt.
            tokenizer: decodes the prompt; by default that of the folder or hub id from which the model was loaded.
            outputs: the length of the logits and hidden states that a plain call ``model(...)`` returns: ``"full"``
                is that of the prompt, and a dropped position shows the state of the last kept position before it;
                ``"reduced"`` is that of the shortened prompt, described by `run.rows`.
            strict: whether leaving the block raises instead of warning if no image was reduced.

        Raises:
            TypeError: if no adapter supports the model.
            ValueError: if the adapter does not provide a needed signal (on entering).
            RuntimeError: if the model has a reducer already (on entering).
        """
        from tokenprune.attach import Attachment

        return Attachment(model, self, question, tokenizer, outputs, strict)

    def attach(
        self,
        model: Any,
        *,
        question: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        outputs: Literal["full", "reduced"] = "full",
    ) -> Attachment:
        """Attach the strategy until `Attachment.detach` is called, for servers: ``handle = reducer.attach(model)``.

        Arguments and errors are those of ``reducer(model)``. The record is ``handle.run``.
        """
        attachment = self(model, question=question, tokenizer=tokenizer, outputs=outputs)
        attachment.attach()
        return attachment

    def within_budget(
        self,
        image: EncodedImage,
        choose: Callable[[int], tuple[Tensor, list[int]]],
        scores: Tensor | None = None,
        limit: int | None = None,
        geometry: TileGeometry | None = None,
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
            geometry: the layout that ``choose`` answers for; that of the image if left out.
        """
        geometry, budget = image.geometry if geometry is None else geometry, as_budget(self.budget)
        asked = budget.asked(geometry)
        limit = int(geometry.valid.sum()) if limit is None else limit
        number = min(asked, limit)
        kept, granted = choose(number)
        separators = kept_newlines(geometry, kept, self.newlines)
        if budget.newlines == "counted":

            def cost(kept: Tensor) -> int:
                return int(kept.sum()) + int(kept_newlines(geometry, kept, self.newlines).sum())

            while number > 0 and cost(kept) > asked:
                number = max(0, number - (cost(kept) - asked))
                kept, granted = choose(number)
            while number < min(asked, limit):
                more, more_granted = choose(number + 1)
                if cost(more) > asked:
                    break
                number, kept, granted = number + 1, more, more_granted
            separators = kept_newlines(geometry, kept, self.newlines)
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
        valid = image.geometry.valid.to(image.device)
        scores = checked_scores(self, image, valid)

        def choose(number: int) -> tuple[Tensor, list[int]]:
            kept = top_of_image(scores, number, valid)
            return kept, kept.sum(dim=1).tolist()

        return self.within_budget(image, choose, scores)


@dataclass
class ImageReducer(TokenReducer):
    """A strategy that acts before the vision tower: the image is encoded at a lower resolution.

    The budget is a ceiling: only products of height and width can be encoded.
    """

    stage: ClassVar[Stage] = ImageStage()
    exact: ClassVar[bool] = False

    @property
    def needs(self) -> Sequence[Signal]:
        """A vision tower that takes other resolutions."""
        return (Signal("resolution"),)

    @abstractmethod
    def token_grid(self, geometry: TileGeometry) -> tuple[int, int] | None:
        """Return height x width of the tokens at which every tile is encoded; None if the budget allows none."""

    def select(self, image: EncodedImage) -> Selection:
        """Return where the new tokens stand among those of the full resolution."""
        geometry, grid = image.geometry, self.token_grid(image.geometry)
        kept = torch.zeros(geometry.tiles, geometry.tokens, dtype=torch.bool)
        if grid is not None:
            kept = kept | geometry.valid.cpu() if grid == geometry.token_grid else geometry.resized(grid)[1]
        kept = kept.to(image.device)
        separators = torch.zeros(geometry.separators, dtype=torch.bool, device=kept.device)
        if self.newlines != "drop":
            separators = kept_newlines(geometry, kept, "keep_rows")
        asked = as_budget(self.budget).asked(geometry)
        return Selection(geometry, kept, asked, separators=separators, resized_grid=grid)


@dataclass
class ComponentReducer(TokenReducer):
    """A strategy made of exchangeable parts: an allocation divides the budget over the tiles, a selection spends it.

    Args:
        allocation: tokens per tile.
        selection: which tokens in a tile.
        merging: how dropped tokens live on in others; None drops them.
        order: the order in which kept tokens enter the LLM; None keeps the model's own. Other orders need
            ``positions="reindex"``.
        padding: ``"exclude"`` never pays for tokens that the model's unpadding removes; ``"ignore"`` chooses as if they
            were there and loses them afterwards, as published code does: then fewer tokens are kept than asked.
    """

    allocation: AllocationPolicy = field(kw_only=True)
    selection: SelectionPolicy = field(kw_only=True)
    merging: MergingPolicy | None = field(default=None, kw_only=True)
    order: OrderPolicy | None = field(default=None, kw_only=True)
    padding: Literal["exclude", "ignore"] = field(default="exclude", kw_only=True)

    def __post_init__(self) -> None:
        """Check the options once."""
        super().__post_init__()
        if self.padding not in ("exclude", "ignore"):
            raise ValueError(f"padding={self.padding!r} is not known; use 'exclude' or 'ignore'")
        for name, kind, optional in (
            ("allocation", AllocationPolicy, False),
            ("selection", SelectionPolicy, False),
            ("merging", MergingPolicy, True),
            ("order", OrderPolicy, True),
        ):
            part = getattr(self, name)
            if not isinstance(part, kind) and not (optional and part is None):
                raise ValueError(f"{name}={part!r} is no {kind.__name__}; give an instance of one")
        if self.order is not None and self.positions == "preserve":
            raise ValueError(
                f"order={self.order!r} moves tokens, so their old position ids mean nothing; "
                "use positions='reindex', or order=None"
            )

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that the parts read."""
        parts = (self.allocation, self.selection, self.merging, self.order)
        return [signal for part in parts if part is not None for signal in part.needs]

    def select(self, image: EncodedImage) -> Selection:
        """Divide the budget over the tiles, then choose inside each tile (or in the one pool of all tiles)."""
        geometry, device = image.geometry, image.device
        if self.allocation.pools_tiles and geometry.sub_images:
            places = geometry.packed[geometry.packed != NEWLINE].to(device)[None]
            image = image.in_packed_order()
        else:
            places = torch.arange(geometry.tiles * geometry.tokens, device=device).view(geometry.tiles, -1)
        valid = image.geometry.valid.to(device)
        candidates = self._candidates(valid)
        scores = checked_scores(self.selection, image, candidates)
        capacity = candidates.sum(dim=1).tolist()
        chosen: list[tuple[Tensor, Tensor, Merged | None]] = []  # of every try; the last answers for its own mask

        def at_places(values: Tensor, fill: float) -> Tensor:
            flat = values.new_full((geometry.tiles * geometry.tokens,), fill)
            return flat.scatter(0, places.flatten(), values.flatten()).view(geometry.tiles, geometry.tokens)

        def choose(number: int) -> tuple[Tensor, list[int]]:
            granted = self.allocation.allocate(image, number, capacity, scores)
            kept, merged = self._pick(image, scores, torch.tensor(granted, device=device), candidates)
            kept = kept & valid
            kept_at = at_places(kept, False)
            chosen.append((kept_at, kept, merged))
            return kept_at, kept_at.sum(dim=1).tolist() if self.allocation.pools_tiles else granted

        selection = self.within_budget(image, choose, at_places(scores, -torch.inf), sum(capacity), geometry)
        kept, merged = next((kept, merged) for mask, kept, merged in chosen if mask is selection.kept)
        if merged is None and self.order is None:
            return selection
        in_prompt = geometry.packed[geometry.packed != NEWLINE].to(device)
        in_prompt = in_prompt[selection.kept.flatten()[in_prompt]]  # flat index of each kept token, in packed order
        slot = torch.empty(geometry.tiles * geometry.tokens, dtype=torch.long, device=device)
        slot[places.flatten()] = torch.arange(places.numel(), device=device)
        mixing, order = None, None
        made = torch.zeros_like(kept, dtype=torch.long) if merged is None else merged.made
        if merged is not None:
            mixing = _mixing(merged.weights, slot[in_prompt], places, geometry)
        if self.order is not None:
            rank = self.order.rank(image, scores, kept, made).flatten()[slot[in_prompt]]
            order = rank.argsort(stable=True)
        before = self.merging is not None and self.merging.before_projector
        return replace(selection, mixing=mixing, before_projector=before and mixing is not None, order=order)

    def _candidates(self, valid: Tensor) -> Tensor:
        """Return the tokens that are chosen from, bool `[tiles, tokens]`."""
        return torch.ones_like(valid) if self.padding == "ignore" else valid

    def mask(self, image: EncodedImage) -> Tensor:
        """Return the kept tokens alone, bool `[tiles, tokens]`: one graph of one shape, that reads no number.

        The same tokens as `select` keeps, without what is drawn, counted and checked; for
        ``torch.compile(reducer.mask, fullgraph=True)`` and CUDA graphs. Ties of shares may fall otherwise
        (`apportion_tensor`).

        Args:
            image: the encoded image; `image.geometry.valid` must have been read before.

        Raises:
            ValueError: if a part of the strategy decides step by step, or newlines are counted.
        """
        plain = type(self.selection).pick is SelectionPolicy.pick and self.merging is None and self.order is None
        budget = as_budget(self.budget)
        if not plain or self.allocation.pools_tiles or budget.newlines == "counted":
            raise ValueError(
                f"{self!r} is no single graph: it needs a selection that ranks scores, an allocation by tiles, no "
                "merging, no order, and free newlines; use select"
            )
        geometry = image.geometry
        valid = geometry.valid.to(image.device)
        candidates = self._candidates(valid)
        scores = self.selection.score(image).float().masked_fill(~candidates, -torch.inf)
        capacity = candidates.sum(dim=1)
        granted = apportion_tensor(budget.asked(geometry), self.allocation.weights(image, capacity, scores), capacity)
        return top_per_tile(scores, granted, candidates) & valid

    def _pick(
        self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Merged | None]:
        """Return the kept tokens, bool `[tiles, tokens]`, and what merging made of them."""
        room = candidates.sum(dim=1)
        reserved = torch.zeros_like(budgets) if self.merging is None else self.merging.reserve(budgets, room)
        if self.merging is None or (not bool(reserved.any()) and bool((budgets >= room).all())):
            return self.selection.pick(image, scores, budgets, candidates), None
        picked = self.selection.pick(image, scores, budgets - reserved, candidates)
        merged = self.merging.merge(image, scores, picked, reserved, candidates)
        return picked | (merged.made > 0), merged


def _mixing(weights: Tensor, rows: Tensor, places: Tensor, geometry: TileGeometry) -> Tensor:
    """Return the mixing matrix of a selection from the weights inside each tile, sparse `[kept, tokens of all tiles]`.

    Args:
        weights: weights inside each tile, `[tiles, tokens, sources]`.
        rows: the tile and token (``tile * tokens + token``) of each kept token in packed order, `[kept]`.
        places: the flat index of each token in the image, `[tiles, tokens]`.
        geometry: the layout of the image.
    """
    tiles, tokens = places.shape
    total = geometry.tiles * geometry.tokens
    cls_columns = weights.shape[2] - tokens
    columns = torch.cat([places, total + torch.arange(tiles, device=places.device)[:, None]], dim=1)
    columns = columns[:, : tokens + cls_columns][rows // tokens]
    mixing = weights.new_zeros(len(rows), total + cls_columns * geometry.tiles)
    return mixing.scatter(1, columns, weights.flatten(0, 1)[rows]).to_sparse()
