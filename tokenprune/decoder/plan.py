"""The plan of one call: which visual tokens remain behind each cut."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.account import RowLengths
from tokenprune.batch import BatchSelection
from tokenprune.caches import find_cache
from tokenprune.decoder.narrow_cache import find_cache_layer, is_narrow
from tokenprune.decoder.narrow_layers import CutStep, NarrowLayers
from tokenprune.decoder.placement import Entries, narrow_mask
from tokenprune.decoder.trace import LayerTrace
from tokenprune.decoder.views import ImagePositions, SignalSource
from tokenprune.geometry import NEWLINE, TileGeometry, share_layouts
from tokenprune.image import EncodedImage
from tokenprune.packing import pack_masks, position_tables, read_counts
from tokenprune.run import RunCut
from tokenprune.selection import Selection, true_indices
from tokenprune.stages import mix


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """The positions of a prompt as it enters the LLM.

    Args:
        placeholders: positions of the tokens of images, bool `[rows, length]`.
        mask: attention mask of the prompt; its last columns belong to these positions.
        tokens: number of real positions of each row.
        layouts: the layout of each image, restricted to the tokens that enter the LLM.
        row_of_image: the prompt row of each image.
        labels: labels of a loss, `[rows, length]`; None without a loss.
        past: length of the sequence in the cache.
    """

    placeholders: Tensor
    mask: Tensor
    tokens: Sequence[int]
    layouts: Sequence[TileGeometry]
    row_of_image: Sequence[int]
    labels: Tensor | None = None
    past: int = 0

    @cached_property
    def is_real(self) -> Tensor:
        """Positions that are not padding, bool `[rows, length]`; all, if the mask is prepared for a kernel."""
        if self.mask.dim() != 2:
            return torch.ones_like(self.placeholders)
        return self.mask[:, -self.placeholders.shape[1] :].to(self.placeholders.device).bool()

    @cached_property
    def text(self) -> list[Tensor]:
        """Positions of the text after each image, before the first label, `[text]` each; read from the device once.

        Of an image without tokens it is all text of the row.
        """
        placeholders, is_real, last = self.placeholders.cpu(), self.is_real.cpu(), self.last.cpu()
        positions, text = torch.arange(placeholders.shape[1]), []
        image_positions = placeholders.nonzero()[:, 1].split([len(layout.packed) for layout in self.layouts])
        for row, image in zip(self.row_of_image, image_positions, strict=True):
            end = int(image[-1]) if len(image) else -1
            is_text = is_real[row] & ~placeholders[row] & (positions > end) & (positions <= last[row])
            text.append(positions[is_text].to(self.placeholders.device))
        return text

    @property
    def image_positions(self) -> int:
        """Number of positions of all images."""
        return sum(len(layout.packed) for layout in self.layouts)

    @cached_property
    def last(self) -> Tensor:
        """Position of the last token of the prompt of each row, before the first label, `[rows]`."""
        positions = torch.arange(self.is_real.shape[1], device=self.is_real.device)
        real = self.is_real
        if self.labels is not None:
            has_label = (self.labels != -100).long().cumsum(dim=1) > 0
            before = real & ~has_label
            real = torch.where(before.any(dim=1, keepdim=True), before, real)
        return positions.expand_as(real).masked_fill(~real, -1).amax(dim=1)


class CutStrategy(Protocol):
    """The strategy of a plan, bound to the layers of an LLM."""

    cuts: tuple[int, ...]
    """The first layer of each cut."""
    reads_text: bool
    """Whether the strategy reads the text after an image."""

    def select(self, cut: int, view: CutView) -> BatchSelection:
        """Return the selections of all images at a cut."""


@dataclass(frozen=True, eq=False)
class CutView:
    """What the tokens of the images are at a cut, before the strategy reads it.

    Args:
        cuts: the first layer of each cut.
        images: the encoded images, with signals of the vision tower.
        layouts: the layout of each image, restricted to the tokens that are left.
        row_of_image: the prompt row of each image.
        positions: the prompt position of each position of the packed images, `[positions]`.
        hidden: hidden states that enter the layer of the cut, `[rows, length, dim]`.
        prompt: the positions of the prompt.
        entries: the entries behind each earlier cut; None where layers run on all positions.
        traces: what earlier layers computed, by layer index.
        repeats: how often each prompt row is repeated in the inputs of the layer.
        args: positional inputs of the layer.
        kwargs: keyword inputs of the layer.
    """

    cuts: Sequence[int]
    images: Sequence[EncodedImage]
    layouts: Sequence[TileGeometry]
    row_of_image: Sequence[int]
    positions: Tensor
    hidden: Tensor
    prompt: PromptLayout
    entries: Sequence[Entries | None]
    traces: Mapping[int, LayerTrace]
    repeats: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def lengths(self) -> list[int]:
        """Number of packed positions of each image."""
        return [len(layout.packed) for layout in self.layouts]

    @property
    def token_counts(self) -> list[int]:
        """Number of visual tokens of each image that are left."""
        return [layout.valid_tokens for layout in self.layouts]

    @cached_property
    def token_index(self) -> Tensor:
        """Index of each visual token among the packed positions of all images, `[tokens]`."""
        _, is_token = position_tables(tuple(self.layouts), self.positions.device)
        return true_indices(is_token, sum(self.token_counts))

    @cached_property
    def token_positions(self) -> Tensor:
        """The prompt position of each visual token, `[tokens]`."""
        return self.positions[self.token_index]

    @cached_property
    def token_rows(self) -> Tensor:
        """The prompt row of each visual token, `[tokens]`."""
        return self.rows[self.token_index]

    def entries_of(self, layer: int) -> Entries | None:
        """Return the entries of a layer that ran, or of the inputs of the layer of this cut; None for all positions.

        Args:
            layer: index of the layer.
        """
        earlier = min(bisect_right(self.cuts, layer), len(self.entries))
        return self.entries[earlier - 1] if earlier else None

    def locate(self, trace: LayerTrace, layer: int, reads_text: bool) -> SignalSource:
        """Return a traced layer with the positions of the images in it.

        Args:
            trace: what the layer computed.
            layer: index of the layer.
            reads_text: whether the text after the images is read.
        """
        prompt, entries = self.prompt, self.entries_of(layer)
        text = prompt.text if reads_text else [self.positions[:0]] * len(self.layouts)
        last, positions = prompt.last, self.token_positions
        if entries is None:
            later = self.hidden.shape[1] - prompt.is_real.shape[1]
            is_real = F.pad(prompt.is_real, (0, later)) if later else prompt.is_real
        else:
            source = entries.source
            positions = source[self.token_rows, positions]
            last = source.gather(1, last[:, None])[:, 0]
            text = [source[row, part] for row, part in zip(self.row_of_image, text, strict=True)]
            is_real = torch.ones_like(entries.index, dtype=torch.bool)
            is_real = is_real if entries.is_filler is None else ~entries.is_filler
        parts = zip(self.row_of_image, positions.split(self.token_counts), text, strict=True)
        return SignalSource(trace, [ImagePositions(*part) for part in parts], last, is_real)

    @property
    def layer_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of the layer of this cut for the tokens that are left, of the first repetition of each row.

        Keys of earlier turns remain if the layer stores all of them.
        """
        entries, kwargs = self.entries[-1] if self.entries else None, dict(self.kwargs)
        hidden = self.hidden if entries is None else entries.take(self.hidden)
        cache_layer = find_cache_layer(find_cache(kwargs), self.cuts[len(self.entries)])
        keeps_cache = self.prompt.past > 0 and entries is None and self.repeats == 1 and not is_narrow(cache_layer)
        rotary = kwargs.get("position_embeddings")
        if rotary is not None:
            parts = rotary if isinstance(rotary, tuple) else (rotary,)
            rows = [part if part.shape[-3] == 1 else part[..., :: self.repeats, :, :] for part in parts]
            rows = rows if entries is None else [entries.take_rotary(part) for part in rows]
            kwargs["position_embeddings"] = tuple(rows) if isinstance(rotary, tuple) else rows[0]
        if (ids := kwargs.get("position_ids")) is not None:
            ids = ids if ids.shape[-2] == 1 else ids[..., :: self.repeats, :]
            kwargs["position_ids"] = ids if entries is None else entries.take_ids(ids)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor):
            mask = mask[:: self.repeats] if len(mask) > 1 else mask
            if not keeps_cache:
                mask = mask[..., self.prompt.past : self.prompt.past + self.hidden.shape[1]]
            if entries is not None:
                mask = narrow_mask(mask, entries.index, entries.index, entries.is_filler, "bool")
            kwargs["attention_mask"] = mask
        if not keeps_cache:
            kwargs |= {name: None for name in ("cache", "past_key_values") if name in kwargs}
        if self.args:
            return (hidden, *self.args[1:]), kwargs
        return (), {**kwargs, "hidden_states": hidden}

    @cached_property
    def rows(self) -> Tensor:
        """The prompt row of each packed position, `[positions]`."""
        return expand_rows(tuple(self.row_of_image), tuple(self.lengths), self.positions.device)


@lru_cache(maxsize=256)
def expand_rows(row_of_image: tuple[int, ...], lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the prompt row of each packed position, `[positions]`.

    Args:
        row_of_image: the prompt row of each image.
        lengths: number of packed positions of each image.
        device: the device of the result.
    """
    with torch.inference_mode(False):  # a later call may record gradients
        numbers = [row for row, length in zip(row_of_image, lengths, strict=True) for _ in range(length)]
        return torch.tensor(numbers, dtype=torch.long, device=device)


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
            selections, _, _ = read_counts(batch.selections, kept, batch.checks)
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


def restrict_layouts(layouts: Sequence[TileGeometry], kept: Sequence[Tensor] | None) -> list[TileGeometry]:
    """Return the layouts of the tokens that enter the LLM, in their order; the positions are read from the device.

    Args:
        layouts: the layout of each image.
        kept: the position of each token that enters the LLM in its packed image; None if all enter.
    """
    if kept is None:
        return list(layouts)
    order = torch.cat(list(kept)).cpu().split([len(positions) for positions in kept])
    return share_layouts([replace(g, packed=g.packed[index]) for g, index in zip(layouts, order, strict=True)])


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
