"""The plan of one call: which visual tokens remain behind each cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.account import RowLengths
from tokenprune.batch import BatchSelection
from tokenprune.checks import DeferredCheck
from tokenprune.decoder.narrow_layers import CutStep, NarrowLayers
from tokenprune.decoder.placement import Entries
from tokenprune.decoder.prompt import CutView, PromptLayout
from tokenprune.decoder.trace import LayerTrace
from tokenprune.geometry import NEWLINE, TileGeometry, share_layouts
from tokenprune.image import EncodedImage
from tokenprune.packing import pack_masks, read_counts
from tokenprune.run import RunCut
from tokenprune.selection import Selection, true_indices
from tokenprune.stages import mix


class CutStrategy(Protocol):
    """The strategy of a plan, bound to the layers of an LLM."""

    cuts: tuple[int, ...]
    """The first layer of each cut."""
    reads_text: bool
    """Whether the strategy reads the text after an image."""

    def select(self, cut: int, view: CutView) -> BatchSelection:
        """Return the selections of all images at a cut."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """The mixed tokens of one image at a cut.

    Args:
        row: the prompt row.
        layout: the layout of the tokens before the cut.
        positions: the prompt position of each packed position, `[length]`.
        targets: the prompt positions of the kept tokens, `[kept]`.
        mixing: weights, `[kept, tiles * tokens]`.
    """

    row: int
    layout: TileGeometry
    positions: Tensor
    targets: Tensor
    mixing: Tensor

    def write(self, hidden: Tensor) -> Tensor:
        """Return hidden states with mixtures in place of the kept tokens, `[rows, repeats, length, dim]`.

        Args:
            hidden: hidden states, `[rows, repeats, length, dim]`.
        """
        sources = self.layout.unpack(hidden[self.row, 0, self.positions]).flatten(0, 1)
        mixed = mix(self.mixing.to(hidden.device), sources)
        row = torch.tensor(self.row, device=hidden.device)
        repeat = torch.arange(hidden.shape[1], device=hidden.device)[:, None]
        return hidden.index_put((row, repeat, self.targets), mixed)


class DecoderPlan:
    """The plan of one call; the choice of its first forward pass holds for the whole call.

    Args:
        prompt: the positions of the prompt.
        strategy: the strategy at the cuts.
        images: the encoded images, with signals of the vision tower.
        wide_until: number of first layers whose inputs have the width of the prompt.
    """

    def __init__(
        self, prompt: PromptLayout, strategy: CutStrategy, images: Sequence[EncodedImage], wide_until: int = 0
    ) -> None:
        self.prompt, self.strategy, self.images, self.wide_until = prompt, strategy, images, wide_until
        self.rows = len(prompt.placeholders)
        self.selections: list[list[Selection]] = []
        """The selection of each image at each cut, after the first forward pass."""
        self.traces: dict[int, LayerTrace] = {}
        """What layers before the cuts computed in the first forward pass, by layer index."""
        self.checks: list[DeferredCheck] = []
        """Checks of the selections that were not read from the device."""
        self.lengths: list[list[int]] = []
        """Number of tokens of each prompt row behind each cut."""
        self._remains: list[Tensor | None] = []
        self._mixtures: list[list[Mixture]] = []
        length = prompt.placeholders.shape[1]
        index = true_indices(prompt.placeholders.flatten(), prompt.image_positions)
        self._positions = index if self.rows == 1 else index % length
        self._layouts = list(prompt.layouts)
        if strategy.reads_text:
            prompt.text  # noqa: B018  # read from the device before the model runs
        self._entries: list[Entries | None] = []

    @property
    def is_finished(self) -> bool:
        """Whether every cut has chosen."""
        return len(self.selections) == len(self.strategy.cuts)

    def row_lengths(self, full: Sequence[int], layers: int) -> list[RowLengths]:
        """Return the number of tokens of each prompt row in each layer.

        Args:
            full: number of tokens of each row without reduction.
            layers: number of layers of the LLM.
        """
        bounds = [0, *self.strategy.cuts, layers]
        spans = [stop - start for start, stop in pairwise(bounds)]
        by_row = zip(self.prompt.tokens, *self.lengths, strict=True)
        repeated = (tuple(n for n, span in zip(row, spans, strict=True) for _ in range(span)) for row in by_row)
        return [RowLengths(total, lengths) for total, lengths in zip(full, repeated, strict=True)]

    def list_cuts(self) -> list[RunCut]:
        """Return what each cut kept."""
        return [RunCut(layer, part) for layer, part in zip(self.strategy.cuts, self.selections, strict=True)]

    def is_wide(self, layer: int) -> bool:
        """Return whether the output of a layer has the width of the prompt."""
        return layer + 1 < self.wide_until

    def find_step(
        self,
        cut: int,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        count_stored: Callable[[], int],
    ) -> CutStep | None:
        """Return the step of a forward pass at the first layer of a cut; None if nothing is dropped.

        Args:
            cut: number of the cut.
            hidden: hidden states that enter the layer, `[rows * repeats, length, dim]`.
            args: positional inputs of the layer.
            kwargs: keyword inputs of the layer.
            count_stored: returns the length of the sequence in the cache of the layer.

        Raises:
            NotImplementedError: if the first forward pass does not hold the whole prompt.
        """
        length = self.prompt.is_real.shape[1]
        # A model that assists itself runs the prompt once for each of its two caches.
        if len(self.selections) > cut and (hidden.shape[1] < length or count_stored() > self.prompt.past):
            return None  # new tokens behind the cache: all remain
        if hidden.shape[1] < length:
            raise NotImplementedError(
                f"the first forward pass holds {hidden.shape[1]} of {length} prompt tokens, but a cut inside the LLM "
                "ranks visual tokens by the end of the prompt; call generate without prefill_chunk_size, or reduce "
                "before the LLM (a strategy of the projector stage)"
            )
        if len(self.selections) == cut:
            self._choose(cut, hidden, args, kwargs)
        return self._build_step(cut, hidden)

    def _choose(self, cut: int, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Select the tokens that remain behind a cut, from the first repetition of each prompt row."""
        repeats = len(hidden) // self.rows
        view = CutView(
            self.strategy.cuts,
            self.images,
            self._layouts,
            self.prompt.row_of_image,
            self._positions,
            hidden[::repeats],
            self.prompt,
            tuple(self._entries),
            self.traces,
            repeats,
            args,
            kwargs,
        )
        with torch.no_grad():
            batch = self.strategy.select(cut, view)
            kept = pack_masks(batch.selections)
            selections, _, is_checked = read_counts(batch.selections, kept, batch.checks)
        if not is_checked:
            self.checks.extend(batch.checks)
        raise_unsupported(selections)
        tokens = list(self.lengths[-1] if self.lengths else self.prompt.tokens)
        for row, layout, selection in zip(self.prompt.row_of_image, self._layouts, selections, strict=True):
            tokens[row] -= len(layout.packed) - selection.kept_tokens - selection.kept_newlines
        previous = self._remains[-1] if self._remains else None
        if all(selection.is_identity for selection in selections):
            self._remains.append(previous)
        else:
            before = self.prompt.is_real if previous is None else previous
            remains = before.index_put((view.rows, self._positions), kept.to(before.device))
            self._remains.append(remains)
            if self.prompt.labels is not None:
                self.prompt.labels.masked_fill_(self.prompt.is_real & ~remains, -100)
        self._mixtures.append(self._list_mixtures(view, selections, kept))
        self.selections.append(selections)
        self.lengths.append(tokens)
        if cut + 1 < len(self.strategy.cuts) and self._remains[-1] is not previous:
            self._restrict(view, selections, kept)

    def _list_mixtures(self, view: CutView, selections: Sequence[Selection], kept: Tensor) -> list[Mixture]:
        mixtures = []
        if any(selection.is_mixed for selection in selections):
            parts = zip(self._positions.split(view.lengths), kept.split(view.lengths), strict=True)
            for number, (positions, mask) in enumerate(parts):
                layout, selection = view.layouts[number], selections[number]
                if selection.mixing is not None:
                    is_token = layout.to(positions.device).packed != NEWLINE
                    targets = positions[true_indices(mask & is_token, selection.kept_tokens)]
                    row = view.row_of_image[number]
                    mixtures.append(Mixture(row, layout, positions, targets, selection.mixing))
        return mixtures

    def _restrict(self, view: CutView, selections: Sequence[Selection], kept: Tensor) -> None:
        """Restrict layouts and positions to the tokens that are left; the mask is read from the device."""
        number = sum(selection.kept_tokens + selection.kept_newlines for selection in selections)
        self._positions = self._positions[true_indices(kept, number)]
        masks = kept.cpu().split(view.lengths)
        restricted = [layout.restrict(mask) for layout, mask in zip(view.layouts, masks, strict=True)]
        self._layouts = share_layouts(restricted)

    def _build_step(self, cut: int, hidden: Tensor) -> CutStep | None:
        """Return the step of a forward pass with the prompt and possibly later tokens, all of which remain."""
        remains, mixtures = self._remains[cut], self._mixtures[cut]
        if remains is None:
            self._note_entries(cut, None)
            return None
        repeats, later = len(hidden) // self.rows, hidden.shape[1] - remains.shape[1]
        is_real = self.prompt.is_real
        if later:
            remains, is_real = (F.pad(mask, (0, later), value=True) for mask in (remains, is_real))
        counts = [count + later for count in self.lengths[cut]]
        width = max(*counts, 2)  # a width of 1 means a decode step
        has_fillers = any(count != width for count in counts)
        entries = Entries.from_mask(remains, is_real, width, has_fillers)
        self._note_entries(cut, entries)
        edit = partial(self._write_mixtures, mixtures) if mixtures else None
        return CutStep(entries.repeat(repeats), self.prompt.past, edit)

    def _note_entries(self, cut: int, entries: Entries | None) -> None:
        """Store the entries behind a cut of the first forward pass for the later cuts."""
        if len(self._entries) == cut:
            self._entries.append(entries)
        if cut + 1 == len(self.strategy.cuts):  # nothing reads the traces after the last cut, nor records new ones
            self.traces.update(dict.fromkeys(self.traces, LayerTrace()))

    def _write_mixtures(self, mixtures: Sequence[Mixture], hidden: Tensor) -> Tensor:
        parts = hidden.unflatten(0, (self.rows, -1))
        for mixture in mixtures:
            parts = mixture.write(parts)
        return parts.flatten(0, 1)


def raise_unsupported(selections: Sequence[Selection]) -> None:
    """Raise an error if a selection cannot be applied inside the LLM.

    Raises:
        ValueError: if tokens are reordered, mixed before the projector, or encoded at another resolution.
    """
    for selection in selections:
        if selection.is_ordered or selection.before_projector or selection.resized_grid is not None:
            raise ValueError(
                "a cut inside the LLM cannot reorder tokens, mix them before the projector or resize the image; use "
                "this strategy before the LLM, without AtLayer"
            )


class CutContext(AbstractContextManager[None]):
    """The context of a call with cuts; every entry makes a new plan.

    Args:
        layers: the hooks of the layers.
        build_plan: builds the plan of the call.
        record: records a finished plan; it is not called after an error or without a forward pass.
    """

    def __init__(
        self, layers: NarrowLayers, build_plan: Callable[[], DecoderPlan], record: Callable[[DecoderPlan], None]
    ) -> None:
        self._layers, self._build_plan, self._record = layers, build_plan, record
        self._stack = ExitStack()
        self._plan: DecoderPlan | None = None

    def __enter__(self) -> None:
        """Apply a new plan to the calls of this thread."""
        self._plan = self._build_plan()
        self._stack.enter_context(self._layers.run(self._plan))

    def __exit__(self, *error: object) -> None:
        """Remove the plan, and record it if every cut has chosen."""
        plan, self._plan = self._plan, None
        self._stack.close()
        if plan is not None and plan.is_finished:
            self._record(plan)
