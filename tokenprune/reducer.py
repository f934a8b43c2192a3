"""Strategies: the abstract `TokenReducer` and its base classes for scores, image resolution and components."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.budget import Budget, as_budget, copy_to_device, normalize_budget
from tokenprune.checks import defer_checks, raise_if
from tokenprune.geometry import TileGeometry
from tokenprune.image import ALIGNED_SIGNALS, TEXT_SIGNALS, EncodedImage, Signal
from tokenprune.policies import AllocationPolicy, Configurable, Merged, MergingPolicy, OrderPolicy, SelectionPolicy
from tokenprune.saliency import SOURCES, Attention, SaliencyModel
from tokenprune.selection import (
    MaskCount,
    Newlines,
    Selection,
    count_newlines,
    kept_newlines,
    top_of_image,
    true_indices,
)
from tokenprune.stages import ImageStage, ProjectorStage, Stage

if TYPE_CHECKING:
    from tokenprune.attach import Attachment


@dataclass
class TokenReducer(Configurable, ABC):
    """A token reduction strategy: maps an encoded image to a selection of its tokens.

    The fields of an instance are its whole configuration, on the command line, in YAML files and in W&B. To write a
    strategy, subclass it, implement `select`, and declare in `needs` the signals that `select` reads besides the
    features.

    Args:
        budget: tokens that may enter the LLM: a float or ``"20%"`` is a ratio, an int a count; `Budget` has options.
        positions: position ids of the remaining tokens: ``"reindex"`` (0, 1, 2, ...) or ``"preserve"`` (as in the full
            prompt).
        newlines: newline tokens: ``"keep_rows"`` keeps the newline token of each row that keeps a visual token;
            ``"drop"`` drops all newline tokens, ``"keep"`` keeps all.
        text_model: for strategies that read the question: the CLIP checkpoint of the vision tower, with its text
            tower. A folder, a hub id, or ``"mini"`` for the text tower of the embedded model.
        attention: for strategies that read CLS attention: its source. ``"auto"`` reads CLS attention if the vision
            tower has a CLS token, and otherwise the attention that each token receives. ``"cls"``, ``"received"`` and
            ``"pooling"`` (the query of SigLIP's pooling head) fix the source. A `SaliencyModel` (`TimmSaliency`)
            computes the attention with another model.
        text_separators: text separators between rows or tiles of an image, such as ``[IMG_BREAK]`` (newline tokens are
            not text, see `newlines`). ``"keep"`` keeps all. ``"drop_empty"`` drops the text separators of rows and
            tiles without a kept token. Text that opens or closes the whole image always remains.
    """

    stage: ClassVar[Stage] = ProjectorStage()
    """Where the strategy acts: before the vision tower, or between the tower and the LLM."""
    exact: ClassVar[bool] = True
    """Whether the budget is always spent in full. If false, the budget is an upper limit; the docstring of the strategy
    gives the reason."""
    published: ClassVar[str] = ""
    """Where the method was published: venue and arXiv number."""
    parity: ClassVar[str] = ""
    """Number of recorded cases of the official implementation with equal results, and the compared quantity."""

    budget: int | float | str | Budget = 0.2
    positions: Literal["reindex", "preserve"] = "reindex"
    newlines: Newlines = "keep_rows"
    text_model: str | None = None
    attention: Attention | SaliencyModel = "auto"
    text_separators: Literal["keep", "drop_empty"] = "keep"

    def __post_init__(self) -> None:
        """Check the options when the strategy is created, not at the first image."""
        super().__post_init__()
        self.budget = normalize_budget(self.budget)
        if not isinstance(self.attention, SaliencyModel) and self.attention not in ("auto", *SOURCES):
            words = ", ".join(map(repr, ("auto", *SOURCES)))
            raise ValueError(f"attention={self.attention!r} is not known; use one of {words}, or a SaliencyModel")

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that `select` reads; features and geometry are always available."""
        return ()

    @property
    def reads_question(self) -> bool:
        """Whether a needed signal is computed from the question or lies in the space that image and text share."""
        return any(signal.kind in TEXT_SIGNALS | ALIGNED_SIGNALS for signal in self.needs)

    @abstractmethod
    def select(self, image: EncodedImage) -> Selection:
        """Select the tokens of one image. The result depends only on the image and the fields of this instance.

        `torch.vmap` can run this method once for several images of one layout: store no tensors and count no calls.
        """

    def reduce(self, image: EncodedImage) -> Selection:
        """Return the checked result of `select` for one image, completed by newline tokens and pixels.

        Raises:
            ValueError: if `select` returned a mask of the wrong shape or type, or kept tokens that are not valid.
        """
        selection = self.select(image)
        geometry, kept = image.geometry, selection.kept
        if kept.dtype != torch.bool or tuple(kept.shape) != (geometry.tiles, geometry.tokens):
            raise ValueError(
                f"{type(self).__name__}.select must return a bool mask of shape [{geometry.tiles}, {geometry.tokens}] "
                f"(tiles, tokens), not {kept.dtype} {list(kept.shape)}"
            )
        layout = geometry.to(kept.device)
        raise_if(
            (kept & ~layout.valid).any(),
            f"{type(self).__name__}.select kept tokens that the model's own unpadding removes; "
            "choose among image.geometry.valid",
        )
        counts, count = list(selection.counts), selection.token_count
        kept_number = kept.sum()
        if count is not None:
            raise_if(
                kept_number != count,
                f"{type(self).__name__} declares that {count} tokens are kept, but the mask keeps another number; "
                "a component whose property is_exact is true must spend the budget",
            )
        self._check_mixing(selection, kept_number)
        newline_mask = selection.newline_mask
        if newline_mask is None:
            newline_mask = kept_newlines(geometry, kept, self.newlines)
            newline_count = count_newlines(geometry, count, self.newlines)
            counts += [] if newline_count is None else [MaskCount.of(newline_mask, newline_count)]
        return replace(selection, newline_mask=newline_mask, counts=tuple(counts), pixels=image.pixels)

    def _check_mixing(self, selection: Selection, kept_number: Tensor) -> None:
        """Raise an error, or defer the check, if the mixing matrix or the order does not fit the kept tokens."""
        geometry, mixing, order = selection.geometry, selection.mixing, selection.order
        name, total = type(self).__name__, geometry.tiles * geometry.tokens
        widths = {total, total + geometry.tiles} if selection.before_projector else {total}
        if mixing is not None:
            expected = f"it must be [kept, {' or '.join(map(str, sorted(widths)))}] (kept, sources)"
            message = f"{name}.select returned a mixing matrix of {list(mixing.shape)}; {expected}"
            if mixing.dim() != 2 or mixing.shape[1] not in widths:
                raise ValueError(message)
            raise_if(kept_number != len(mixing), f"{message}, with a row for each kept token")
        if order is not None:
            is_sorted = (order.sort()[0] == torch.arange(len(order), device=order.device)).all()
            raise_if(
                ~is_sorted | (kept_number != len(order)),
                f"{name}.select returned an order that is no permutation of the kept tokens",
            )

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
            question: for strategies that read the question: one string for all prompts, or one per row of a batch. By
                default the question is read from the prompt.
            tokenizer: decodes the prompt. By default it is loaded from the folder or hub id of the model.
            outputs: the length of the logits and hidden states that a plain call ``model(...)`` returns. ``"full"``
                keeps the length of the prompt: a dropped position repeats the state of the last kept position before
                it. ``"reduced"`` returns the length of the shortened prompt, described by `run.rows`.
            strict: whether leaving the block raises an error instead of a warning if no image was reduced.

        Raises:
            TypeError: if no adapter supports the model.
            ValueError: if the adapter does not provide a needed signal (on entering).
            RuntimeError: if the model already has a reducer (on entering).
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

        Takes the arguments of ``reducer(model)`` and raises the same errors. The record is ``handle.run``.
        """
        attachment = self(model, question=question, tokenizer=tokenizer, outputs=outputs)
        attachment.attach()
        return attachment

    def select_within_budget(
        self,
        image: EncodedImage,
        select_tokens: Callable[[int], tuple[Tensor, Sequence[int] | Tensor]],
        scores: Tensor | None = None,
        limit: int | None = None,
        geometry: TileGeometry | None = None,
    ) -> Selection:
        """Return the selection that spends the budget exactly.

        If newline tokens are free, ``select_tokens`` is called once. If they are counted, their number depends on the
        kept tokens. The method then searches for the largest number of tokens that fits the budget together with its
        newline tokens. Budget that remains keeps newline tokens of emptied rows.

        Args:
            image: the encoded image.
            select_tokens: maps a number of tokens to the kept tokens (bool `[tiles, tokens]`) and the tokens granted
                per tile.
            scores: scores to draw with the selection, `[tiles, tokens]`.
            limit: largest number of tokens to pass to ``select_tokens``; by default the number of valid tokens.
            geometry: the layout of the masks that ``select_tokens`` returns; by default the layout of the image.
        """
        geometry, budget = image.geometry if geometry is None else geometry, as_budget(self.budget)
        asked = budget.asked(geometry)
        limit = geometry.valid_tokens if limit is None else limit
        number = min(asked, limit)
        kept, granted = select_tokens(number)
        newline_mask = None
        if budget.newlines == "counted":

            def count_tokens(kept: Tensor) -> int:
                return int(kept.sum()) + int(kept_newlines(geometry, kept, self.newlines).sum())

            while number > 0 and count_tokens(kept) > asked:
                number = max(0, number - (count_tokens(kept) - asked))
                kept, granted = select_tokens(number)
            while number < min(asked, limit):
                next_kept, next_granted = select_tokens(number + 1)
                if count_tokens(next_kept) > asked:
                    break
                number, kept, granted = number + 1, next_kept, next_granted
            newline_mask = kept_newlines(geometry, kept, self.newlines)
            if self.newlines == "keep_rows":
                spare = max(0, asked - count_tokens(kept))
                newline_mask = newline_mask.clone()
                newline_mask[(~newline_mask).nonzero()[:spare, 0]] = True
            elif self.newlines == "keep" and int(newline_mask.sum()) > asked:
                newline_mask = torch.arange(geometry.newlines, device=newline_mask.device) < asked
        return Selection(
            geometry,
            kept,
            asked,
            budgets=granted if isinstance(granted, Tensor) else copy_to_device(granted, kept.device),
            scores=scores,
            newline_mask=newline_mask,
        )


def score_candidates(scorer: ScoreReducer | SelectionPolicy, image: EncodedImage, candidates: Tensor) -> Tensor:
    """Return the checked scores of ``scorer``, float32 `[tiles, tokens]`, with `-inf` at tokens that are no candidates.

    Raises:
        ValueError: if the scores have the wrong shape, or the score of a candidate is NaN.
    """
    scores = scorer.score(image)
    if scores.shape != candidates.shape:
        raise ValueError(
            f"{type(scorer).__name__}.score must return [tiles, tokens] = {list(candidates.shape)}, "
            f"not {list(scores.shape)}"
        )
    raise_if(
        (scores.isnan() & candidates).any(),
        f"{type(scorer).__name__}.score returned NaN; a score must be a number for every valid token",
    )
    finite = scores.float().clamp(min=torch.finfo(torch.float32).min)  # -inf marks tokens that are no candidates
    return finite.masked_fill(~candidates, -torch.inf)


@dataclass
class ScoreReducer(TokenReducer):
    """A strategy with one score per token: keeps the tokens with the largest scores of all tiles."""

    @abstractmethod
    def score(self, image: EncodedImage) -> Tensor:
        """Return the score of each token, `[tiles, tokens]`; larger scores are kept first."""

    def select(self, image: EncodedImage) -> Selection:
        """Keep the tokens with the largest scores."""
        geometry = image.geometry.to(image.device)
        scores = score_candidates(self, image, geometry.valid)

        def select_tokens(number: int) -> tuple[Tensor, Tensor]:
            kept = top_of_image(scores, number, geometry.valid)
            return kept, kept.sum(dim=1)

        selection = self.select_within_budget(image, select_tokens, scores)
        if selection.newline_mask is not None:  # counted newline tokens: the number of tokens depends on the scores
            return selection
        return selection.with_token_count(min(selection.asked, geometry.valid_tokens))


@dataclass
class ImageReducer(TokenReducer):
    """A strategy that acts before the vision tower: the image is encoded at a lower resolution.

    The budget is an upper limit, because the number of tokens is the product of a height and a width.
    """

    stage: ClassVar[Stage] = ImageStage()
    exact: ClassVar[bool] = False

    @property
    def needs(self) -> Sequence[Signal]:
        """The signal ``"resolution"``: requires a vision tower that accepts other resolutions."""
        return (Signal("resolution"),)

    @abstractmethod
    def token_grid(self, geometry: TileGeometry) -> tuple[int, int] | None:
        """Return the token grid (height, width) at which every tile is encoded; None if no grid fits the budget."""

    def select(self, image: EncodedImage) -> Selection:
        """Return the selection of the resized image: the positions of its tokens in the full-resolution layout."""
        geometry, grid = image.geometry, self.token_grid(image.geometry)
        kept = torch.zeros(geometry.tiles, geometry.tokens, dtype=torch.bool)
        if grid is not None:
            kept = kept | geometry.valid.cpu() if grid == geometry.token_grid else geometry.resized(grid)[1]
        kept = kept.to(image.device)
        newline_mask = torch.zeros(geometry.newlines, dtype=torch.bool, device=kept.device)
        if self.newlines != "drop":
            newline_mask = kept_newlines(geometry, kept, "keep_rows")
        asked = as_budget(self.budget).asked(geometry)
        return Selection(geometry, kept, asked, newline_mask=newline_mask, resized_grid=grid)


@dataclass
class ComponentReducer(TokenReducer):
    """A strategy of exchangeable components: the allocation divides the budget over the tiles, the selection spends it.

    Args:
        allocation: divides the budget over the tiles.
        selection: selects tokens inside each tile.
        merging: merges dropped tokens into kept ones; None drops them.
        order: the order in which kept tokens enter the LLM; None keeps the packed order of the model. An order needs
            ``positions="reindex"``.
        padding: ``"exclude"`` selects only tokens that remain after the unpadding of the model. ``"ignore"`` selects
            among all tokens and loses the padding afterwards, as published code does. Fewer tokens than asked are then
            kept.
    """

    allocation: AllocationPolicy = field(kw_only=True)
    selection: SelectionPolicy = field(kw_only=True)
    merging: MergingPolicy | None = field(default=None, kw_only=True)
    order: OrderPolicy | None = field(default=None, kw_only=True)
    padding: Literal["exclude", "ignore"] = field(default="exclude", kw_only=True)

    def __post_init__(self) -> None:
        """Check the options when the strategy is created."""
        super().__post_init__()
        for name, base, is_optional in (
            ("allocation", AllocationPolicy, False),
            ("selection", SelectionPolicy, False),
            ("merging", MergingPolicy, True),
            ("order", OrderPolicy, True),
        ):
            component = getattr(self, name)
            if not isinstance(component, base) and not (is_optional and component is None):
                raise ValueError(f"{name}={component!r} is no {base.__name__}; pass an instance of a subclass")
        if self.order is not None and self.positions == "preserve":
            raise ValueError(
                f"order={self.order!r} moves tokens, so their old position ids do not apply; "
                "use positions='reindex', or order=None"
            )

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that the components read."""
        components = (self.allocation, self.selection, self.merging, self.order)
        return [signal for component in components if component is not None for signal in component.needs]

    def select(self, image: EncodedImage) -> Selection:
        """Divide the budget over the tiles, then select tokens inside each tile, or among all tiles in one pool."""
        geometry, device = image.geometry.to(image.device), image.device
        if self.allocation.pools_tiles and geometry.sub_images:
            flat_index = geometry.token_order[None]
            image = image.flatten_tiles()
        else:
            flat_index = torch.arange(geometry.tiles * geometry.tokens, device=device).view(geometry.tiles, -1)
        layout = image.geometry.to(device)
        candidates = self._find_candidates(layout.valid)
        capacity = layout.valid_per_tile if self.padding == "exclude" else (layout.tokens,) * layout.tiles
        scores = score_candidates(self.selection, image, candidates)
        attempts: list[tuple[Tensor, Tensor, Merged | None]] = []  # one entry per call of select_tokens

        def scatter_to_tiles(values: Tensor, fill: float) -> Tensor:
            if flat_index.shape == (geometry.tiles, geometry.tokens):
                return values
            flat = values.new_full((geometry.tiles * geometry.tokens,), fill)
            return flat.scatter(0, flat_index.flatten(), values.flatten()).view(geometry.tiles, geometry.tokens)

        def select_tokens(number: int) -> tuple[Tensor, Sequence[int] | Tensor]:
            granted = self.allocation.allocate(image, number, capacity, scores)
            budgets = granted if isinstance(granted, Tensor) else copy_to_device(granted, device)
            kept, merged = self._pick(image, scores, budgets, candidates, number >= sum(capacity))
            kept = kept & layout.valid
            mask = scatter_to_tiles(kept, False)
            attempts.append((mask, kept, merged))
            return mask, mask.sum(dim=1) if self.allocation.pools_tiles else granted

        tile_scores = scatter_to_tiles(scores, -torch.inf)
        selection = self.select_within_budget(image, select_tokens, tile_scores, sum(capacity), geometry)
        kept, merged = next((kept, merged) for mask, kept, merged in attempts if mask is selection.kept)
        count = self._count_kept(selection, layout)
        if count is not None:
            selection = selection.with_token_count(count)
        if merged is None and self.order is None:
            return selection
        is_kept = selection.kept.flatten()[geometry.token_order]
        kept_order = is_kept.nonzero()[:, 0] if count is None else true_indices(is_kept, count)
        kept_index = geometry.token_order[kept_order]  # flat index of each kept token, in packed order
        local = kept_index  # index of each kept token in the image that the components read
        if image.geometry.original is not geometry.original:  # the tiles are pooled
            local = torch.zeros(geometry.tiles * geometry.tokens, dtype=torch.long, device=device)
            local = local.scatter(0, flat_index.flatten(), torch.arange(flat_index.numel(), device=device))[kept_index]
        mixing, order = None, None
        kind = torch.zeros_like(kept, dtype=torch.long) if merged is None else merged.kind
        if merged is not None:
            mixing = _build_mixing(merged.weights, local, flat_index, geometry)
        if self.order is not None:
            rank = self.order.rank(image, scores, kept, kind).flatten()[local]
            order = rank.argsort(stable=True)
        mixes_inputs = self.merging is not None and self.merging.before_projector and mixing is not None
        return replace(selection, mixing=mixing, before_projector=mixes_inputs, order=order)

    def mask(self, image: EncodedImage) -> Tensor:
        """Return only the mask of kept tokens, bool `[tiles, tokens]`, as one graph of static shape.

        Keeps the same tokens as `select`, without checks, and reads nothing from the device. For
        ``torch.compile(reducer.mask, fullgraph=True)`` and CUDA graphs.

        Args:
            image: the encoded image. Before a graph is captured, call `mask` once for the same layout and device, which
                copies the index tables of the layout to the device.

        Raises:
            ValueError: if a component cannot be part of one graph, or newline tokens are counted.
        """
        is_exact = self.allocation.is_exact and self.selection.is_exact and self.merging is None and self.order is None
        if not is_exact or as_budget(self.budget).newlines == "counted":
            raise ValueError(
                f"{self!r} is no single graph: it needs a selection and an allocation with the property is_exact, no "
                "merging, no order, and free newlines; use select"
            )
        if torch.compiler.is_compiling():
            return self.select(image).kept
        with defer_checks():
            return self.select(image).kept

    def _count_kept(self, selection: Selection, layout: TileGeometry) -> int | None:
        """Return the number of kept tokens if it follows from the budget alone; None if the mask must be counted.

        Args:
            selection: the kept tokens and the budgets of the tiles.
            layout: the layout in which tokens are selected.
        """
        is_exact = self.allocation.is_exact and self.selection.is_exact
        is_exact = is_exact and (self.merging is None or self.merging.is_exact)
        has_padding = self.padding == "ignore" and layout.valid_tokens < layout.tiles * layout.tokens
        is_counted = as_budget(self.budget).newlines == "counted"
        if has_padding or is_counted or not is_exact:
            return None
        return min(selection.asked, layout.valid_tokens)

    def _find_candidates(self, valid: Tensor) -> Tensor:
        """Return the tokens that the selection may keep, bool `[tiles, tokens]`."""
        return torch.ones_like(valid) if self.padding == "ignore" else valid

    def _pick(
        self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor, keeps_all: bool
    ) -> tuple[Tensor, Merged | None]:
        """Return the kept tokens, bool `[tiles, tokens]`, and the result of merging; None if nothing is merged."""
        capacity = candidates.sum(dim=1)
        if self.merging is None:
            return self.selection.pick(image, scores, budgets, candidates), None
        reserved = self.merging.reserve(budgets, capacity)
        if keeps_all and not bool(reserved.any()):  # no token is dropped and none is reserved
            return self.selection.pick(image, scores, budgets, candidates), None
        picked = self.selection.pick(image, scores, budgets - reserved, candidates)
        merged = self.merging.merge(image, scores, picked, reserved, candidates)
        return picked | (merged.kind > 0), merged


def _build_mixing(weights: Tensor, rows: Tensor, flat_index: Tensor, geometry: TileGeometry) -> Tensor:
    """Return the mixing matrix of a selection, `[kept, tokens of all tiles]`, from the weights inside each tile.

    Args:
        weights: weights inside each tile, `[tiles, tokens, sources]`.
        rows: the index (``tile * tokens + token``) of each kept token in packed order, `[kept]`.
        flat_index: the flat index of each token in the image, `[tiles, tokens]`.
        geometry: the layout of the image.
    """
    tiles, tokens = flat_index.shape
    total = geometry.tiles * geometry.tokens
    cls_columns = weights.shape[2] - tokens
    columns = torch.cat([flat_index, total + torch.arange(tiles, device=flat_index.device)[:, None]], dim=1)
    columns = columns[:, : tokens + cls_columns][rows // tokens]
    mixing = weights.new_zeros(len(rows), total + cls_columns * geometry.tiles)
    return mixing.scatter(1, columns, weights.flatten(0, 1)[rows])
