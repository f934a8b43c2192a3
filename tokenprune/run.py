"""The record of an attached strategy: selections, account and kept positions. It holds no reference to the model."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenprune.account import HISTORY, RowLengths, TokenAccount
from tokenprune.adapter import LLMShape
from tokenprune.budget import NoTokenWarning
from tokenprune.checks import DeferredCheck, raise_first_failure, stack_failures
from tokenprune.encoder.patches import PatchRecord
from tokenprune.rewrite import Rows
from tokenprune.selection import Selection

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

DRAWABLE = 8
"""The number of first images of a run that keep their pixels, scores and mixing matrices."""

MAX_DEFERRED = 256
"""The largest number of stored checks; if there are more, they are read from the device."""


class SelectionHistory:
    """Selections in the order of the calls: the first are complete, later ones are compact and limited in number."""

    def __init__(self) -> None:
        self._complete: list[Selection] = []
        self._compact: deque[Selection] = deque(maxlen=HISTORY)

    def add(self, complete: Sequence[Selection], compact: Sequence[Selection]) -> None:
        """Add the selections of one call.

        Args:
            complete: selections that keep scores and mixing matrices.
            compact: selections without them.
        """
        self._complete += complete
        self._compact += compact

    def read(self) -> list[Selection]:
        """Return the last `HISTORY` selections, compact ones on the CPU."""
        self._compact = deque((selection.cpu() for selection in self._compact), maxlen=HISTORY)
        return [*self._complete, *self._compact][-HISTORY:]


@dataclass(frozen=True, eq=False)
class RunCut:
    """What the cut at one layer of the LLM kept.

    Args:
        layer: the first layer without the dropped tokens.
        selections: one selection per image, in the order of the calls. Its layout has the tokens that were left
            before the cut.
    """

    layer: int
    selections: list[Selection]


class Run:
    """The record of the calls inside a block.

    Recording a call reads nothing from an accelerator; tensors are moved to the CPU when a property is read. Memory is
    bounded. The first `DRAWABLE` selections are complete; later selections are stored without scores and mixing
    matrices. Only the last `HISTORY` selections are kept. Totals of the account cover all calls.

    Args:
        strategy: name of the strategy.
        llm: the shape of the language model.
        attention: the source that the strategy reads as CLS attention; None if it reads no CLS attention.
        budget: budget of the strategy as text.
    """

    def __init__(self, strategy: str, llm: LLMShape, attention: str | None = None, budget: str = "") -> None:
        self.strategy = strategy
        self.budget = budget
        """The budget of the strategy as text, such as ``"20%"``."""
        self.attention = attention
        """The source that the strategy reads as CLS attention; None if it reads no CLS attention."""
        self.account = TokenAccount(llm, attention=attention)
        """Tokens, cache bytes and FLOPs of all calls."""
        self._history = SelectionHistory()
        self._cuts: dict[int, SelectionHistory] = {}
        self._tower_masks: list[Tensor | None] = []
        self._checks: list[DeferredCheck] = []
        self._rows: Rows | None = None

    @property
    def selections(self) -> list[Selection]:
        """The tokens that entered the LLM: one selection per image, in the order of the calls; the last `HISTORY`.

        Raises:
            ValueError: if the strategy returned an invalid selection that was not read so far.
        """
        self.raise_failed_checks()
        return self._history.read()

    @property
    def cuts(self) -> list[RunCut]:
        """The cuts inside the LLM with their selections, in ascending order of layers; empty without such a strategy.

        Raises:
            ValueError: if the strategy returned an invalid selection that was not read so far.
        """
        self.raise_failed_checks()
        return [RunCut(layer, self._cuts[layer].read()) for layer in sorted(self._cuts)]

    def overlay(
        self,
        number: int = 0,
        image: Image.Image | None = None,
        question: str | None = None,
        answer: str | None = None,
    ) -> Image.Image:
        """Draw the tokens of an image that remain, and the stage at which each dropped token left.

        Args:
            number: number of the image in `selections`.
            image: the original image, drawn next to the tiles.
            question: the question, drawn above the tiles below strategy and budget.
            answer: the answer, drawn below the question.

        Raises:
            ValueError: if no image was reduced, or the selection has no pixels (a run keeps the pixels of its first
                images only).
        """
        from tokenprune.viz import format_caption, overlay

        selections = self.selections
        if not selections:
            raise ValueError("no image was reduced, so there is nothing to draw; call the model inside the block first")
        caption = format_caption(self.strategy, self.budget, selections[number], question, answer)
        return overlay(selections[number], image, self.find_cuts(number), caption, self.find_tower_mask(number))

    def find_tower_mask(self, number: int) -> Tensor | None:
        """Return the tokens of an image whose patches remained in the vision tower, bool `[tiles, tokens]`.

        The result is None if no strategy dropped or merged patches there, if a token consists of several patches, or if
        the image is not among the first images of the run.

        Args:
            number: number of the image in `selections`.
        """
        mask = self._tower_masks[number] if 0 <= number < len(self._tower_masks) else None
        return None if mask is None else mask.cpu()

    def find_cuts(self, number: int) -> dict[int, Selection]:
        """Return the selections of an image at the cuts, by the first layer without dropped tokens.

        Args:
            number: number of the image in `selections`.
        """
        return {cut.layer: cut.selections[number] for cut in self.cuts}

    @property
    def rows(self) -> Rows | None:
        """The positions of the full prompt that remained in the last call; None before the first call."""
        self._rows = None if self._rows is None else self._rows.cpu()
        return self._rows

    @property
    def drawable(self) -> int:
        """Number of following images that keep their pixels."""
        return max(0, DRAWABLE - self.account.image_count)

    def store_checks(self, checks: Sequence[DeferredCheck]) -> None:
        """Store checks of selections that were not read from the device; `raise_failed_checks` reads them.

        Args:
            checks: the checks.

        Raises:
            ValueError: if more than `MAX_DEFERRED` checks are stored and one of them failed.
        """
        self._checks.extend(checks)
        if len(self._checks) > MAX_DEFERRED:
            self.raise_failed_checks()

    def raise_failed_checks(self) -> None:
        """Read the stored checks from the device, and raise the error of the first failed check.

        Raises:
            ValueError: if a check failed.
        """
        checks, self._checks = self._checks, []
        if checks:
            raise_first_failure(checks, stack_failures(checks, checks[0].failed.device).tolist())

    def add(
        self,
        selections: Sequence[Selection],
        rows: Rows,
        lengths: Sequence[RowLengths | tuple[int, int]],
        saliency_flops: int = 0,
        cuts: Sequence[RunCut] = (),
        signal_flops: int = 0,
        patches: PatchRecord | None = None,
    ) -> None:
        """Record one call.

        Args:
            selections: one selection per image.
            rows: the positions of the full prompt that remain.
            lengths: number of tokens of each prompt row without padding; a pair (full, reduced) means the reduced
                length in all layers.
            saliency_flops: FLOPs of the saliency model.
            cuts: the selections at each cut inside the LLM.
            signal_flops: FLOPs of the signals of the LLM.
            patches: the patches that remained in the vision tower; None if no strategy acted inside it.
        """
        if any(selection.asked == 0 for selection in selections):
            warnings.warn(
                f"the budget of {self.strategy} grants no visual token of an image, so the model answers without it; "
                "set a larger budget, such as 0.2",
                NoTokenWarning,
                stacklevel=2,
            )
        drawable = self.drawable
        complete, compact = selections[:drawable], [s.compact() for s in selections[drawable:]]
        for cut in cuts:
            history = self._cuts.setdefault(cut.layer, SelectionHistory())
            history.add(cut.selections[:drawable], [s.compact() for s in cut.selections[drawable:]])
        self.account.add([*complete, *compact], lengths, {cut.layer: cut.selections for cut in cuts})
        self.account.saliency_flops += saliency_flops
        self.account.signal_flops += signal_flops
        masks: list[Tensor | None] = [None] * len(selections)
        if patches is not None:
            self.account.add_patches(patches)
            if patches.kept is not None:
                masks = [*patches.kept] * (len(selections) // len(patches.kept))
        self._tower_masks += masks[:drawable]
        self._rows = rows
        self._history.add(complete, compact)

    def __repr__(self) -> str:
        """Return the strategy and its account in one line."""
        return f"Run({self.strategy}: {self.account})"
