"""Strategies: the abstract `TokenReducer`, its composition, and the base class of strategies with a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokenprune.budget import Budget, as_budget, copy_to_device, format_budget, normalize_budget
from tokenprune.checks import raise_if
from tokenprune.contracts import check_needs, describe_value, locate_method, require_count, require_tensor
from tokenprune.geometry import TileGeometry
from tokenprune.image import ALIGNED_SIGNALS, TEXT_SIGNALS, EncodedImage, Signal
from tokenprune.policies import Configurable, SelectionPolicy
from tokenprune.saliency import SOURCES, Attention, SaliencyModel, list_attention_layers
from tokenprune.selection import (
    MaskCount,
    Newlines,
    Selection,
    count_newlines,
    kept_newlines,
    top_of_image,
)
from tokenprune.source_code import locate_class
from tokenprune.stages import STAGE_ORDER, ProjectorStage, SeveralStages, Stage

if TYPE_CHECKING:
    from tokenprune.attach import Attachment
    from tokenprune.compiled import CompileOptions


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
            tower. A folder, a hub id, or ``"mini"`` or ``"mini-pages"`` for an embedded model.
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
        name = type(self).__name__
        models = [value for value in vars(self).values() if isinstance(value, nn.Module)]
        if models:
            raise TypeError(
                f"{name} received a model ({type(models[0]).__name__}) as an option; attach the strategy with "
                f"`with {name}(...)(model) as run:`, or with `{name}(...).attach(model)`"
            )
        super().__post_init__()
        if self.__dataclass_fields__["budget"].init:  # otherwise a part has it, which already gave the warning
            try:
                self.budget = normalize_budget(self.budget)
            except ValueError as error:
                raise ValueError(f"{name}: {error}{locate_class(type(self))}") from None
        check_needs(self)
        if not isinstance(self.attention, SaliencyModel) and self.attention not in ("auto", *SOURCES):
            words = ", ".join(map(repr, ("auto", *SOURCES)))
            raise ValueError(f"attention={self.attention!r} is not known; use one of {words}, or a SaliencyModel")

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that `select` reads; features and geometry are always available."""
        return ()

    @property
    def label(self) -> str:
        """The name of the strategy in records and tables."""
        return type(self).__name__

    @property
    def budget_label(self) -> int | float | str | Budget:
        """The budget in records and tables: the budget of one stage, or a text with the budgets of several cuts."""
        return self.budget

    def list_parts(self) -> Sequence[TokenReducer]:
        """Return the strategies that act one after another; one strategy is its only part."""
        return (self,)

    def with_options(self, **options: Any) -> TokenReducer:
        """Return the strategy with options of `TokenReducer` changed, in every part of a composition.

        Args:
            options: ``budget``, ``text_model`` and other fields that all strategies have.
        """
        return replace(self, **options)

    def __rshift__(self, later: TokenReducer) -> TokenReducer:
        """Return the composition of this strategy and a strategy of a later stage: ``HiRED(0.4) >> FastV()``."""
        if not isinstance(later, TokenReducer):
            return NotImplemented
        return Composed([*self.list_parts(), *later.list_parts()])

    @property
    def is_single_graph(self) -> bool:
        """Whether `select` is one graph of static shape for `torch.compile`, without reads from the device."""
        return False

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
            TypeError: if `select` returned no selection of tensors.
            ValueError: if `select` returned a mask of the wrong shape or type, or kept tokens that are not valid.
        """
        selection = self.select(image)
        if not isinstance(selection, Selection):
            raise TypeError(
                f"{type(self).__name__}.select must return a Selection, not {describe_value(selection)}"
                f"{locate_method(self, 'select')}"
            )
        geometry, place = image.geometry, locate_method(self, "select")
        shape = (geometry.tiles, geometry.tokens)
        kept = require_tensor(selection.kept, self, "select", "`kept` [tiles, tokens]", shape, "bool")
        require_count(selection.asked, self, "select", "the tokens that the budget grants (`asked`)")
        layout = geometry.to(kept.device)
        raise_if(
            (kept & ~layout.valid).any(),
            f"{type(self).__name__}.select kept tokens that the model's own unpadding removes; "
            f"choose among image.geometry.valid{place}",
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
        name, place, total = type(self).__name__, locate_method(self, "select"), geometry.tiles * geometry.tokens
        widths = {total, total + geometry.tiles} if selection.before_projector else {total}
        if mixing is not None:
            expected = f"it must be [kept, {' or '.join(map(str, sorted(widths)))}] (kept, sources)"
            message = f"{name}.select returned a mixing matrix of {describe_value(mixing)}; {expected}"
            if not isinstance(mixing, Tensor) or mixing.dim() != 2 or mixing.shape[1] not in widths:
                raise ValueError(message + place)
            raise_if(kept_number != len(mixing), f"{message}, with a row for each kept token{place}")
        if order is not None:
            message = f"{name}.select returned an order that is no permutation of the kept tokens"
            if not isinstance(order, Tensor):
                raise TypeError(f"{message}, but {describe_value(order)}{place}")
            is_sorted = (order.sort()[0] == torch.arange(len(order), device=order.device)).all()
            raise_if(~is_sorted | (kept_number != len(order)), message + place)

    def __call__(
        self,
        model: Any,
        *,
        question: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        outputs: Literal["full", "reduced"] = "full",
        strict: bool = False,
        compile: bool | CompileOptions = False,
        pad_to_multiple_of: int | None = None,
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
            compile: whether vision tower, reducer and language model run as graphs of ``torch.compile``; with CUDA
                graphs on a GPU. The first call of each layout and prompt width compiles, which takes seconds to
                minutes. `CompileOptions` selects another compiler. See docs/how-to/compile.md.
            pad_to_multiple_of: number of which the width of a reduced prompt is a multiple; the prompts are padded on
                the left, and the padding is masked. By default 64 with `compile`, and 1 (no padding) without.

        Raises:
            TypeError: if no adapter supports the model.
            ValueError: if the adapter does not provide a needed signal, or the model cannot be compiled (on entering).
            RuntimeError: if the model already has a reducer (on entering).
        """
        from tokenprune.attach import Attachment

        return Attachment(
            model,
            self,
            question,
            tokenizer,
            outputs,
            strict,
            compile=compile,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def attach(
        self,
        model: Any,
        *,
        question: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        outputs: Literal["full", "reduced"] = "full",
        compile: bool | CompileOptions = False,
        pad_to_multiple_of: int | None = None,
    ) -> Attachment:
        """Attach the strategy until `Attachment.detach` is called, for servers: ``handle = reducer.attach(model)``.

        Takes the arguments of ``reducer(model)`` and raises the same errors. The record is ``handle.run``.
        """
        attachment = self(
            model,
            question=question,
            tokenizer=tokenizer,
            outputs=outputs,
            compile=compile,
            pad_to_multiple_of=pad_to_multiple_of,
        )
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


@dataclass
class Composed(TokenReducer):
    """Strategies that act one after another: ``Composed([HiRED(0.4), FastV(layer=2, budget=0.5)])``.

    Each part keeps its own budget and options. The budget of a part inside the LLM refers to the tokens that entered
    the LLM: here, 40 % of the tokens enter, and half of them remain from layer 2 on. The same object is
    ``HiRED(0.4) >> FastV(layer=2, budget=0.5)``.

    Args:
        parts: the strategies in the order of their stages (image, encoder, projector, decoder), at most one of each
            stage. The last part before the LLM determines `positions`.
    """

    stage: ClassVar[Stage] = SeveralStages()

    budget: int | float | str | Budget = field(init=False, default=1.0)
    positions: Literal["reindex", "preserve"] = field(init=False, default="reindex")
    newlines: Newlines = field(init=False, default="keep_rows")
    text_model: str | None = field(init=False, default=None)
    attention: Attention | SaliencyModel = field(init=False, default="auto")
    text_separators: Literal["keep", "drop_empty"] = field(init=False, default="keep")
    parts: Sequence[TokenReducer]

    def __post_init__(self) -> None:
        """Check the order of the parts, and read the options that they share.

        Raises:
            TypeError: if a part is no strategy.
            ValueError: if there are fewer than two parts, if stages are repeated or not in order, or if two parts read
                the vision tower with different options.
        """
        self.parts = list(self.parts)
        if wrong := [part for part in self.parts if not isinstance(part, TokenReducer) or isinstance(part, Composed)]:
            raise TypeError(f"the parts of Composed are single strategies, but {wrong[0]!r:.200} is none")
        names = [part.stage.name for part in self.parts]
        if len(names) < 2:
            raise ValueError(f"Composed needs at least two strategies, but it has {len(names)}; use one on its own")
        order = [STAGE_ORDER.index(name) for name in names]
        if sorted(set(order)) != order:
            raise ValueError(
                f"the parts act at the stages {', '.join(names)}, but a model runs the stages "
                f"{', '.join(STAGE_ORDER)} in this order; pass at most one strategy of each stage, in this order"
            )
        if any(part.stage.resizes for part in self.parts) and {"encoder", "projector"} & set(names):
            raise ValueError(
                "a strategy that resizes images cannot be composed with a strategy of the encoder or projector stage, "
                "because signals are captured at full resolution; compose one of them with a strategy of the decoder "
                "stage"
            )
        first = self.parts[0]
        self.budget, self.positions, self.newlines = first.budget, first.positions, first.newlines
        self.text_separators = first.text_separators
        readers = [part for part in self.parts if list_attention_layers(part.needs)]
        self.attention = _share_option("attention", readers) if readers else first.attention
        question_readers = [part for part in self.parts if part.reads_question]
        self.text_model = _share_option("text_model", question_readers) if question_readers else first.text_model
        super().__post_init__()

    @property
    def label(self) -> str:
        """The labels of the parts, joined by ``+``."""
        return "+".join(part.label for part in self.parts)

    @property
    def budget_label(self) -> str:
        """The budgets of the parts, joined by ``+``: ``"40% + 50% from layer 2"``."""
        return " + ".join(format_budget(part.budget_label) for part in self.parts)

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that the parts read."""
        signals = [signal for part in self.parts for signal in part.needs]
        return tuple(signal for number, signal in enumerate(signals) if signal not in signals[:number])

    def list_parts(self) -> Sequence[TokenReducer]:
        """Return the strategies that act one after another."""
        return list(self.parts)

    def with_options(self, **options: Any) -> Composed:
        """Return the composition with options changed in every part."""
        return Composed([part.with_options(**options) for part in self.parts])

    def select(self, image: EncodedImage) -> Selection:
        """Return the selection of the first part."""
        return self.parts[0].select(image)


def _share_option(name: str, parts: Sequence[TokenReducer]) -> Any:
    """Return an option that is equal in all parts.

    Raises:
        ValueError: if the parts differ in it.
    """
    values = [getattr(part, name) for part in parts]
    if any(value != values[0] for value in values):
        raise ValueError(
            f"the parts {' and '.join(part.label for part in parts)} read the vision tower with different values of "
            f"{name}: {', '.join(map(repr, values))}; set the same value"
        )
    return values[0]


def score_candidates(scorer: ScoreReducer | SelectionPolicy, image: EncodedImage, candidates: Tensor) -> Tensor:
    """Return the checked scores of ``scorer``, float32 `[tiles, tokens]`, with `-inf` at tokens that are no candidates.

    Raises:
        TypeError: if the scores are no tensor.
        ValueError: if the scores have the wrong shape or device, or the score of a candidate is NaN.
    """
    scores = require_tensor(
        scorer.score(image), scorer, "score", "[tiles, tokens]", candidates.shape, "real", candidates.device
    )
    raise_if(
        (scores.isnan() & candidates).any(),
        f"{type(scorer).__name__}.score returned NaN; a score must be a number for every valid token"
        f"{locate_method(scorer, 'score')}",
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
