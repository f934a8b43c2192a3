"""Base classes of strategies that drop visual tokens inside the LLM, at one or several cuts."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar, Literal

from tokenprune.budget import Budget, as_budget, format_budget, parse_amount
from tokenprune.cuts import Cut, as_entered_budget
from tokenprune.image import APPLICATION_SIGNALS, EncodedImage, Signal
from tokenprune.reducer import TokenReducer
from tokenprune.saliency import Attention, SaliencyModel
from tokenprune.selection import Newlines, Selection
from tokenprune.stages import DecoderStage, Stage


@dataclass
class DecoderReducer(TokenReducer, ABC):
    """A strategy that drops visual tokens inside the LLM: layers from a cut on run on the tokens that remain.

    `select` receives the image as it enters the layer of the cut: `features` are hidden states, `geometry.valid` marks
    the tokens that are left, and signals of the LLM are declared in `needs`. What an earlier cut dropped stays dropped.

    Args:
        budget: visual tokens that remain after the cut. A ratio refers to the tokens that entered the LLM.
        positions: position ids after a cut: ``"preserve"`` (as in the prompt), or ``"reindex"`` (counted anew).
        text_separators: text is never dropped inside the LLM; only ``"keep"`` is accepted.
        layer: the first layer without the dropped tokens: an index from 1, or a relative depth from 0.0 to 1.0.
    """

    stage: ClassVar[Stage] = DecoderStage()

    budget: int | float | str | Budget = 0.5
    positions: Literal["reindex", "preserve"] = "preserve"
    layer: int | float = 2

    def __post_init__(self) -> None:
        """Check the options; a number as budget refers to the tokens that entered the LLM.

        Raises:
            ValueError: if an option is not valid, or cuts do not ascend.
        """
        super().__post_init__()
        if self.text_separators != "keep":
            raise ValueError(
                f"text_separators={self.text_separators!r} drops text of the prompt, and a cut inside the LLM drops "
                'visual tokens only; set text_separators="keep"'
            )
        cuts = self.cuts
        for cut in cuts:
            if isinstance(cut.layer, bool) or not isinstance(cut.layer, (Integral, float)):
                raise ValueError(
                    f"layer {cut.layer!r} is neither an index nor a relative depth; write an int from 1 or a float "
                    "between 0.0 and 1.0, and take .item() of a tensor"
                )
        for earlier, later in pairwise(cuts):
            if type(earlier.layer) is type(later.layer) and not earlier.layer < later.layer:
                raise ValueError(f"the cuts of a schedule ascend by layer, but {later.layer} follows {earlier.layer}")
        for cut in cuts:
            if cut.layer == 0 or (isinstance(cut.layer, float) and not 0 < cut.layer < 1):
                raise ValueError(
                    f"a cut at layer {cut.layer!r} is not inside an LLM; use a layer from 1, or a relative depth "
                    "between 0.0 and 1.0. To drop tokens before the first layer, use a strategy of the projector stage"
                )

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts in ascending order; strategies with several cuts override it."""
        return (Cut(self.layer, self.budget),)

    @property
    def budget_label(self) -> str:
        """The budget of each cut with its layer: ``"50% from depth 0.25, 25% from depth 0.5"``."""
        kinds = [(cut, "depth" if isinstance(cut.layer, float) else "layer") for cut in self.cuts]
        return ", ".join(f"{format_budget(cut.budget)} from {kind} {cut.layer}" for cut, kind in kinds)

    def at_cut(self, cut: Cut) -> DecoderReducer:
        """Return the strategy with the budget of a cut; a number refers to the tokens that entered the LLM.

        Args:
            cut: one of `cuts`.
        """
        return replace(self, budget=as_entered_budget(cut.budget))


def scale_schedule(amounts: Sequence[int | float], last: int | float) -> list[int | float]:
    """Return the amounts of a schedule with ``last`` as the amount of the last cut.

    Ratios are scaled geometrically: a ratio ``s`` becomes ``last ** (log(s) / log(s_last))``, so that 0.5, 0.25 and
    0.125 become 0.8, 0.64 and 0.512. If an amount is a count, 0.0 or 1.0, the earlier amounts remain as they are.

    Args:
        amounts: the amount of each cut.
        last: the new amount of the last cut.
    """
    is_scaled = all(isinstance(amount, float) and 0 < amount < 1 for amount in amounts) and isinstance(last, float)
    if not is_scaled or last == amounts[-1]:
        return [*amounts[:-1], last]
    return [*(last ** (math.log(amount) / math.log(amounts[-1])) for amount in amounts[:-1]), last]


@dataclass
class ScheduledReducer(DecoderReducer, ABC):
    """A strategy with several cuts: ``PyramidDrop(0.125)`` keeps 50 %, 25 % and 12.5 % at its three cuts.

    Args:
        budget: visual tokens that remain after the last cut. A ratio scales the ratios of earlier cuts (see
            `scale_schedule`). By default the schedule is taken as it is.
        schedule: (layer, budget) of each cut in ascending order; ratios refer to the tokens that entered the LLM.
            Relative depths that are one layer of a shallow LLM are one cut, with the budget of the last of them.
    """

    budget: int | float | str | Budget | None = None  # type: ignore[assignment]
    layer: int | float = field(init=False, default=2)
    schedule: tuple[tuple[int | float, int | float], ...] = field(default=((2, 0.5),), kw_only=True)

    def __post_init__(self) -> None:
        """Read the schedule; without a budget, the budget is the amount of the last cut.

        Raises:
            ValueError: if the schedule is empty, or a later cut keeps more tokens than an earlier cut.
        """
        if not self.schedule:
            raise ValueError("a schedule needs at least one cut (layer, budget), such as ((2, 0.5),)")
        for cut in self.schedule:
            if not isinstance(cut, Sequence) or isinstance(cut, str) or len(cut) != 2:
                raise ValueError(
                    f"a schedule consists of pairs (layer, budget), such as ((2, 0.5),), but {cut!r} is none"
                )
        self.schedule = tuple((layer, parse_amount(amount)) for layer, amount in self.schedule)
        amounts = [amount for _, amount in self.schedule]
        for earlier, later in pairwise(amounts):
            if type(earlier) is type(later) and earlier < later:
                raise ValueError(
                    f"a later cut keeps at most the tokens of an earlier cut, but {later} follows {earlier}"
                )
        self.layer = self.schedule[0][0]
        self.budget = amounts[-1] if self.budget is None else self.budget
        super().__post_init__()

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts of the schedule, scaled to the budget."""
        budget = as_budget(self.schedule[-1][1] if self.budget is None else self.budget)
        amounts = scale_schedule([amount for _, amount in self.schedule], budget.number)
        is_budget = isinstance(self.budget, Budget)
        return tuple(
            Cut(layer, replace(budget, amount=amount) if is_budget else amount)
            for (layer, _), amount in zip(self.schedule, amounts, strict=True)
        )

    def at_cut(self, cut: Cut) -> DecoderReducer:
        """Return the strategy with a single cut and its budget."""
        budget = as_entered_budget(cut.budget)
        return replace(self, budget=budget, schedule=((cut.layer, budget.number),))


@dataclass
class AtLayer(DecoderReducer):
    """Any strategy of the projector stage at a cut inside the LLM: ``AtLayer(2, DivPrune(0.5))``.

    Features are the hidden states that enter the layer. Signals of the vision tower are captured as without a cut.

    Args:
        layer: the first layer without the dropped tokens: an index from 1, or a relative depth from 0.0 to 1.0.
        reducer: the strategy, with its budget; a number as budget refers to the tokens that entered the LLM.
        positions: position ids after the cut: ``"preserve"`` (as in the prompt), or ``"reindex"`` (counted anew).
    """

    budget: int | float | str | Budget = field(init=False, default=0.5)
    positions: Literal["reindex", "preserve"] = field(default="preserve", kw_only=True)
    newlines: Newlines = field(init=False, default="keep_rows")
    text_model: str | None = field(init=False, default=None)
    attention: Attention | SaliencyModel = field(init=False, default="auto")
    text_separators: Literal["keep", "drop_empty"] = field(init=False, default="keep")
    layer: int | float = field()
    reducer: TokenReducer

    def __post_init__(self) -> None:
        """Read budget and options of the strategy.

        Raises:
            TypeError: if the strategy does not act between the vision tower and the LLM.
            ValueError: if the strategy mixes tokens before the projector.
        """
        if not isinstance(self.reducer, TokenReducer) or self.reducer.stage.name != "projector":
            raise TypeError(
                f"AtLayer needs a strategy of the projector stage, such as DivPrune(0.5), not {self.reducer!r:.200}"
            )
        if mixed := sorted({signal.kind for signal in self.reducer.needs} & APPLICATION_SIGNALS):
            raise ValueError(
                f"{self.reducer.label} mixes tokens before the projector ({', '.join(mixed)}), which a cut inside the "
                "LLM cannot do; use it before the LLM, or a strategy without merging at the cut"
            )
        for name in ("budget", "newlines", "text_model", "attention", "text_separators"):
            setattr(self, name, getattr(self.reducer, name))
        super().__post_init__()

    @property
    def label(self) -> str:
        """The label of the strategy, and that it acts at a layer of the LLM."""
        return f"AtLayer({self.reducer.label})"

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that the strategy reads."""
        return self.reducer.needs

    def select(self, image: EncodedImage) -> Selection:
        """Return the selection of the strategy for the image at the cut."""
        return self.reducer.select(image)

    def with_options(self, **options: Any) -> AtLayer:
        """Return the strategy with options of its strategy changed."""
        return replace(self, reducer=self.reducer.with_options(**options))

    def at_cut(self, cut: Cut) -> DecoderReducer:
        """Return the strategy with the budget of a cut."""
        return replace(self, reducer=replace(self.reducer, budget=as_entered_budget(cut.budget)))
