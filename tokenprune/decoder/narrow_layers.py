"""The hooks of decoder layers behind a cut: they run on the entries that remain and return the width of the prompt."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from tokenprune.caches import find_cache
from tokenprune.capabilities import DecoderModules, LayerTracer
from tokenprune.decoder.narrow_cache import find_cache_layer, is_narrow, make_narrow
from tokenprune.decoder.placement import Entries, Kernel, Placement, narrow_mask
from tokenprune.decoder.trace import LayerTrace
from tokenprune.hooks import Hook

STEP_ATTRIBUTE = "tokenprune_step"
"""Attribute of the position embeddings of a call with gradient checkpointing: the steps of the call, for its
recomputation."""


class CutStep:
    """One forward pass of the layers of one cut.

    All layers of a cut share their entries, position embeddings, masks and places. Each is gathered once.

    Args:
        entries: the entries of the forward pass.
        past: length of the sequence before the forward pass.
        edit: writes mixtures into hidden states of the width of the prompt; None if nothing is mixed.
    """

    def __init__(self, entries: Entries, past: int = 0, edit: Callable[[Tensor], Tensor] | None = None) -> None:
        self.entries, self.past, self.edit = entries, past, edit
        self.placement: Placement | None = None
        """The places of all entries after the forward pass; None before the first layer with attention."""
        self._gathered: dict[Any, tuple[Any, Any]] = {}

    @property
    def length(self) -> int:
        """Number of positions of the forward pass."""
        return self.entries.source.shape[1]

    def place(self, before: Placement | None) -> Placement:
        """Return the places of all entries after the forward pass; later calls return the same object.

        Args:
            before: the places of the entries in the cache; None if nothing was dropped before.
        """
        if self.placement is None:
            self.placement = Placement.extended(before, self.entries, self.past, self.length)
        return self.placement

    def gather(self, source: Any, compute: Callable[[], Any], *key: Any) -> Any:
        """Return a value that all layers share; it is computed once for each source.

        Args:
            source: the object that the value is gathered from; it is stored, so that its identity is not reused.
            compute: computes the value.
            key: more values that distinguish the results.
        """
        full_key = (id(source), *key)
        if full_key not in self._gathered:
            self._gathered[full_key] = source, compute()
        return self._gathered[full_key][1]


class CallPlan(Protocol):
    """What the layers read of the call in progress."""

    traces: dict[int, LayerTrace]
    """What layers computed in the first forward pass, by layer index."""

    def find_step(
        self, cut: int, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], has_cache: bool
    ) -> CutStep | None:
        """Return the step of a forward pass at the first layer of a cut; None if nothing is dropped."""

    def is_wide(self, layer: int) -> bool:
        """Return whether the output of a layer has the width of the prompt."""


class _Local(threading.local):
    """The state of one thread."""

    plan: CallPlan | None = None
    steps: tuple[CutStep | None, ...] = ()
    """The step of each cut in the forward pass in progress."""
    step: CutStep | None = None
    """The step of the layer that runs."""
    gathered: tuple[Any, Any, Any] = (None, None, None)
    """Key, sources and value of the last mask of a decode step."""

    def gather(self, key: Any, sources: Any, compute: Callable[[], Any]) -> Any:
        """Return the mask of a decode step, which all layers of a cut share.

        Args:
            key: identifies the sources.
            sources: objects whose identity is in the key; they are stored, so that it is not reused.
            compute: computes the mask.
        """
        if self.gathered[0] != key:
            self.gathered = key, sources, compute()
        return self.gathered[2]


class NarrowLayers:
    """The decoder layers behind the cuts of a strategy.

    Hooks are placed by `hold`. They have no effect on calls without a plan and without a narrow cache.

    Args:
        modules: the modules of the LLM.
        cuts: the first layer of each cut, ascending.
        reindexes: whether positions are counted anew behind the cuts.
        tracer: records what a strategy reads of layers; None if it reads nothing.
    """

    def __init__(
        self,
        modules: DecoderModules,
        cuts: Sequence[int],
        reindexes: bool = False,
        tracer: LayerTracer | None = None,
    ) -> None:
        self.modules, self.cuts, self.reindexes, self.tracer = modules, tuple(cuts), reindexes, tracer
        self._local, self._lock = _Local(), threading.Lock()
        self._holders = 0
        self._undo = ExitStack()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the hooks on the layers inside the block; nested blocks share them."""
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self._place_hooks()
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._undo.close()

    @contextmanager
    def run(self, plan: CallPlan) -> Iterator[None]:
        """Apply a plan to the calls of this thread inside the block."""
        local, previous = self._local, self._local.plan
        recording = nullcontext() if self.tracer is None else self.tracer.record_into(plan.traces)
        with self.hold(), recording:
            local.plan, local.steps = plan, (None,) * len(self.cuts)
            try:
                yield
            finally:
                local.plan, local.steps, local.step = previous, (None,) * len(self.cuts), None

    @property
    def repeats_layers(self) -> bool:
        """Whether the backward pass runs the layers again (gradient checkpointing)."""
        decoder = self.modules.decoder
        return torch.is_grad_enabled() and decoder.training and bool(decoder.is_gradient_checkpointing)

    def _place_hooks(self) -> None:
        for number, layer in enumerate(self.modules.layers):
            if number >= self.cuts[0]:
                before = layer.register_forward_pre_hook(Hook(partial(self._enter_layer, number)), with_kwargs=True)
                self._undo.callback(before.remove)
                # Before transformers' own hooks, which store hidden states for `output_hidden_states`.
                after = layer.register_forward_hook(Hook(partial(self._leave_layer, number)), prepend=True)
                self._undo.callback(after.remove)
        if self.tracer is not None:  # after the hooks above: traces have the entries of narrow layers
            self._undo.enter_context(self.tracer.hold())
        if self.reindexes and self.modules.rotary is not None:
            self._undo.callback(self.modules.rotary.register_forward_hook(Hook(_note_rotary), with_kwargs=True).remove)

    def _enter_layer(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the inputs of a layer at the entries that remain; None if nothing was dropped."""
        hidden = args[0] if args else kwargs["hidden_states"]
        attention = getattr(module, self.modules.attention, None)
        cache_index = number if attention is None else getattr(attention, "layer_idx", number)
        cache = find_cache(kwargs)
        cache_layer = None if attention is None else find_cache_layer(cache, cache_index)
        if hidden.shape[1] == 1:  # a decode step: a function of the cache only, so that it compiles to one graph
            return self._continue(module, args, kwargs, hidden, cache_layer) if is_narrow(cache_layer) else None
        cut = bisect_right(self.cuts, number) - 1
        step = self._find_step(cut, number, hidden, args, kwargs, cache is not None)
        self._local.step = step
        if step is None:
            return self._continue(module, args, kwargs, hidden, cache_layer) if is_narrow(cache_layer) else None
        if attention is not None:
            cache_layer = find_cache_layer(cache, cache_index, creates=True)
        return self._narrow_inputs(step, number, attention, args, kwargs, hidden, cache_layer)

    def _find_step(
        self, cut: int, number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], has_cache: bool
    ) -> CutStep | None:
        local = self._local
        rotary = kwargs.get("position_embeddings")
        tagged = rotary[0] if isinstance(rotary, tuple) else rotary
        if local.plan is None:  # gradient checkpointing repeats a layer in the backward pass
            steps: tuple[CutStep | None, ...] = getattr(tagged, STEP_ATTRIBUTE, ())
            return steps[cut] if steps else None
        if number == self.cuts[cut]:
            step = local.plan.find_step(cut, hidden, args, kwargs, has_cache)
            local.steps = (*local.steps[:cut], step, *local.steps[cut + 1 :])
            if self.repeats_layers:
                setattr(tagged, STEP_ATTRIBUTE, local.steps)
        return local.steps[cut]

    def _narrow_inputs(
        self,
        step: CutStep,
        number: int,
        attention: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: Tensor,
        cache_layer: Any,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs of a layer at the entries of a forward pass, and make its cache layer narrow."""
        entries, changed, mask = step.entries, dict(kwargs), kwargs.get("attention_mask")
        if number in self.cuts or self._widens(number - 1):
            hidden = step.edit(hidden) if step.edit is not None and number in self.cuts else hidden
            hidden = entries.take(hidden)
        if attention is None:  # a convolution reads the mask of its own inputs
            taken = None if mask is None else step.gather(mask, partial(entries.take_ids, mask))
            if entries.is_filler is not None:
                taken = ~entries.is_filler if taken is None else taken.masked_fill(entries.is_filler, 0)
            changed["attention_mask"] = taken
        else:
            place, offset, start, stop = step.place(getattr(cache_layer, "placement", None)), 0, 0, entries.width
            if cache_layer is not None:
                offset = cache_layer.get_mask_sizes(step.length)[1]
                make_narrow(cache_layer, place)
                start, stop = cache_layer.given_entries(entries.width)
            self._check_window(attention, step.past + step.length)
            compute = partial(self._mask, mask, step, None, place, start, stop, offset, cache_layer)
            changed["attention_mask"] = step.gather(mask, compute, start, stop, offset)
            if (rotary := kwargs.get("position_embeddings")) is not None:
                taker = partial(self._count_rotary if self.reindexes else _take_rotary, rotary, entries, place)
                changed["position_embeddings"] = step.gather(rotary, taker)
        if (ids := kwargs.get("position_ids")) is not None:
            changed["position_ids"] = step.gather(ids, partial(entries.take_ids, ids))
        return ((hidden, *args[1:]), changed) if args else ((), {**changed, "hidden_states": hidden})

    def _continue(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, cache_layer: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs of a layer for new tokens behind a narrow cache, all of which remain."""
        place, new, mask = cache_layer.placement, hidden.shape[1], kwargs.get("attention_mask")
        attention = getattr(module, self.modules.attention)
        if is_flash_attention_requested(self.modules.decoder.config):
            self._check_window(attention, int(cache_layer.get_seq_length()) + new)
        changed = dict(kwargs)
        if mask is not None or place.is_filler is not None:
            start, stop = cache_layer.given_entries(new)
            offset = cache_layer.get_mask_sizes(new)[1]
            compute = partial(self._mask, mask, None, new, place, start, stop, offset, cache_layer)
            if torch.compiler.is_compiling():
                changed["attention_mask"] = compute()
            else:
                key = id(mask), id(place), start, stop
                changed["attention_mask"] = self._local.gather(key, (mask, place), compute)
        if self.reindexes and (rotary := kwargs.get("position_embeddings")) is not None:
            changed["position_embeddings"] = self._shift_rotary(rotary, place.removed)
        return args, changed

    def _mask(
        self,
        mask: Any,
        step: CutStep | None,
        new: int | None,
        place: Placement,
        start: int,
        stop: int,
        offset: int,
        cache_layer: Any,
    ) -> Tensor | None:
        """Return the attention mask of a narrow layer for the entries of a step, or for new tokens."""
        if mask is not None and not isinstance(mask, Tensor):
            raise NotImplementedError(
                f"a cut inside the LLM cannot gather an attention mask of type {type(mask).__name__}; load the model "
                'with attn_implementation="sdpa"'
            )
        keys, fillers = place.places(start, stop), place.fillers(start, stop)
        queries = None if step is None else step.entries.index
        query_places = None
        if mask is None:
            query_places = keys[:, -(new or 0) :] if step is None else step.entries.index + step.past
        is_complete = cache_layer is None or not (cache_layer.is_sliding or cache_layer.is_compileable)
        return narrow_mask(
            mask, queries, keys, fillers, self._kernel(), query_places, offset=offset, is_complete=is_complete
        )

    def _kernel(self) -> Kernel:
        config: Any = self.modules.decoder.config
        if is_flash_attention_requested(config):
            return "flash"
        return "float" if config._attn_implementation == "eager" else "bool"

    def _check_window(self, attention: Any, length: int) -> None:
        """Raise an error if a flash kernel counts a sliding window in entries.

        Raises:
            NotImplementedError: if the window is shorter than the sequence.
        """
        window = getattr(attention, "sliding_window", None)
        if window is not None and length > window and is_flash_attention_requested(self.modules.decoder.config):
            raise NotImplementedError(
                f"flash attention counts the sliding window of {window} tokens among the tokens that remain, but the "
                f'sequence has {length}; load the model with attn_implementation="sdpa", or cut before the LLM'
            )

    def _count_rotary(self, value: Any, entries: Entries, place: Placement) -> Any:
        """Return position embeddings that count the entries, up to the counted place of the last entry."""
        last = entries.take_ids(_read_rotary_ids(value))[:, -1:] - place.removed[:, None]
        spare = torch.arange(entries.width - 1, -1, -1, device=last.device)
        return _call_rotary(value, (last - spare).clamp(min=0))

    def _shift_rotary(self, value: Any, removed: Tensor) -> Any:
        """Return position embeddings of new tokens, without the places of dropped tokens."""
        return _call_rotary(value, _read_rotary_ids(value).expand(len(removed), -1) - removed[:, None])

    def _leave_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output of a layer at the width of the prompt, if the next layer does not run on entries."""
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] == 1:
            return None
        step, self._local.step = self._local.step, None
        if step is None or not self._widens(number):
            return None
        wide = step.entries.expand(hidden)
        return (wide, *output[1:]) if isinstance(output, tuple) else wide

    def _widens(self, number: int) -> bool:
        plan = self._local.plan
        is_last = number + 1 == len(self.modules.layers) or number + 1 in self.cuts
        return is_last or plan is None or self.repeats_layers or plan.is_wide(number)


def _take_rotary(value: Any, entries: Entries, place: Placement) -> Any:
    """Return position embeddings at the entries."""
    if isinstance(value, tuple):
        return tuple(entries.take_rotary(part) for part in value)
    return entries.take_rotary(value)


def _note_rotary(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Attach the arguments of a call of the position embeddings to its result, to compute other positions."""
    first = output[0] if isinstance(output, tuple) else output
    first.tokenprune_call = module, args, kwargs


def _read_rotary_ids(value: Any) -> Tensor:
    """Return the position ids from which position embeddings were computed, `[1 or rows, length]`."""
    _, args, kwargs = (value[0] if isinstance(value, tuple) else value).tokenprune_call
    ids: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    return ids


def _call_rotary(value: Any, ids: Tensor) -> Any:
    """Return position embeddings of other positions, computed as the model computed the first ones."""
    module, args, kwargs = (value[0] if isinstance(value, tuple) else value).tokenprune_call
    if "position_ids" in kwargs:
        return module(*args, **{**kwargs, "position_ids": ids})
    return module(args[0], ids, *args[2:], **kwargs)
