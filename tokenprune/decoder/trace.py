"""What decoder layers compute in a prefill, recorded without `output_attentions` and under any attention kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.capabilities import AttentionProbe, DecoderModules
from tokenprune.hooks import Hook
from tokenprune.image import LLM_ATTENTION_SIGNALS, LLM_HIDDEN_SIGNALS


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """What one decoder layer computed in a prefill.

    Args:
        query: rotated queries, `[rows, heads, width, head_dim]`; None if only hidden states are recorded.
        key: rotated keys, `[rows, kv_heads, width, head_dim]`.
        mask: the attention mask that the kernel received.
        scaling: the factor of the logits.
        offset: number of keys before the key of the first query.
        hidden: the input of the layer, `[rows, width, dim]`.
        changes: how attention and MLP change each token, see `measure_change`, `[rows, 2, modules, width]`.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    scaling: float = 1.0
    offset: int = 0
    hidden: Tensor | None = None
    changes: Tensor | None = None

    def take_rows(self, step: int) -> LayerTrace:
        """Return the trace of the first repetition of each prompt row.

        Args:
            step: number of repetitions.
        """
        if step == 1:
            return self
        values = {name: getattr(self, name) for name in ("query", "key", "mask", "hidden", "changes")}
        sliced = {n: v[::step] for n, v in values.items() if v is not None and len(v) > 1}
        return replace(self, **sliced)

    def visible(self, queries: Tensor) -> Tensor:
        """Return which keys queries read, bool `[rows, queries, width]`.

        Args:
            queries: entry of each query, `[rows, queries]`.
        """
        key = require(self.key)
        rows, width = len(queries), key.shape[2]
        positions = torch.arange(width, device=queries.device)
        mask = self.mask
        if mask is None:
            return positions <= queries[..., None] + self.offset
        if mask.dim() == 2:
            return (positions <= queries[..., None] + self.offset) & mask[:, None, :width].bool()
        mask = mask.expand(rows, *mask.shape[1:])[:, 0, :, :width]
        taken = mask.gather(1, queries[..., None].expand(*queries.shape, width))
        return taken if taken.dtype == torch.bool else taken > torch.finfo(taken.dtype).min / 2


def require(value: Tensor | None) -> Tensor:
    """Return a tensor that the needs of a strategy guarantee."""
    assert value is not None
    return value


class LayerTracer:
    """Records what decoder layers compute in prefills.

    Args:
        modules: the modules of the LLM.
        kinds_by_layer: kinds of signals to record, by layer index.
        probe: swaps the attention kernel of a module for one that records.
    """

    def __init__(
        self, modules: DecoderModules, kinds_by_layer: Mapping[int, frozenset[str]], probe: AttentionProbe
    ) -> None:
        self.modules, self.kinds_by_layer, self.probe = modules, kinds_by_layer, probe
        self._local = _Recording()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the hooks on the recorded layers inside the block."""
        with ExitStack() as undo:
            for index in self.kinds_by_layer:
                layer = self.modules.layers[index]
                enter, leave = Hook(partial(self._enter_layer, index)), Hook(partial(self._leave_layer, index))
                undo.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                undo.callback(layer.register_forward_hook(leave, always_call=True).remove)
            yield

    @contextmanager
    def record_into(self, traces: dict[int, LayerTrace]) -> Iterator[None]:
        """Record the prefills of this thread inside the block.

        Args:
            traces: filled with the first trace of each layer, by layer index.
        """
        previous, self._local.traces = self._local.traces, traces
        try:
            yield
        finally:
            self._local.stop_layer()  # torch runs no hook after Ctrl-C
            self._local.traces = previous

    def _enter_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == 1:  # a decode step: it compiles to one graph
            return
        traces, kinds = self._local.traces, self.kinds_by_layer[index]
        if traces is None or index in traces:
            return
        traces[index] = LayerTrace(hidden=hidden.detach() if kinds & LLM_HIDDEN_SIGNALS else None)
        stack = self._local.start_layer()
        if kinds & LLM_ATTENTION_SIGNALS:
            stack.enter_context(self.probe(getattr(module, self.modules.attention), partial(_store, traces, index)))
        if "token_transition" in kinds:
            for name in (self.modules.attention, self.modules.mlp):
                stack.callback(
                    getattr(module, name)
                    .register_forward_hook(Hook(partial(_add_change, traces, index)), with_kwargs=True)
                    .remove
                )

    def _leave_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden is None or hidden.shape[1] > 1:
            self._local.stop_layer()


class _Recording(threading.local):
    """The recording of one thread."""

    traces: dict[int, LayerTrace] | None = None
    stack: ExitStack | None = None

    def start_layer(self) -> ExitStack:
        """Return the contexts of the layer that runs."""
        self.stop_layer()
        self.stack = ExitStack()
        return self.stack

    def stop_layer(self) -> None:
        """Leave the contexts of the layer that runs."""
        stack, self.stack = self.stack, None
        if stack is not None:
            stack.close()


def _store(
    traces: dict[int, LayerTrace], index: int, query: Tensor, key: Tensor, scaling: float | None, mask: Any, _: Any
) -> None:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    traces[index] = replace(traces[index], query=query, key=key, mask=mask, scaling=scale)


def _add_change(
    traces: dict[int, LayerTrace],
    index: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> None:
    """Add the change by an attention or MLP module to the trace of its layer."""
    before = (args[0] if args else kwargs["hidden_states"]).detach()
    after = (output[0] if isinstance(output, tuple) else output).detach()
    previous, value = traces[index].changes, measure_change(before, after)
    traces[index] = replace(traces[index], changes=value if previous is None else torch.cat([previous, value], dim=2))


def measure_change(before: Tensor, after: Tensor) -> Tensor:
    """Return how a module changes each token, `[rows, 2, 1, width]`: ``|after| / |before|`` and ``1 - cos``.

    Args:
        before: input of the module, `[rows, width, dim]`.
        after: output of the module without the residual, `[rows, width, dim]`.
    """
    before, after = before.float(), after.float()
    ratio = after.norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)
    return torch.stack([ratio, 1 - torch.cosine_similarity(before, after, dim=-1)], dim=1)[:, :, None]


def sum_transitions(changes: Tensor, is_real: Tensor) -> Tensor:
    """Return how much a layer changes each token (TransPrune, CVPR 2026), `[rows, width]`.

    It is the sum over attention and MLP of ``|after| / |before| * softmax(1 - cos)``.

    Args:
        changes: the result of `measure_change` for both modules, `[rows, 2, modules, width]`.
        is_real: entries that are tokens of the prompt, bool `[rows, width]`.
    """
    ratio, dissimilarity = changes.unbind(dim=1)
    return (ratio * dissimilarity.masked_fill(~is_real[:, None], -torch.inf).softmax(dim=-1)).sum(dim=1)


class _StopLayerError(Exception):
    """Ends the forward pass of a layer at its attention kernel."""


def ask_layer(
    modules: DecoderModules,
    index: int,
    probe: AttentionProbe,
    hidden: Tensor,
    kwargs: Mapping[str, Any],
    is_rotated: bool = True,
) -> LayerTrace:
    """Return the queries and keys that a layer computes on hidden states, without running its attention.

    The cache is not read or changed. The layer computes bit-identical queries and keys on the same inputs.

    Args:
        modules: the modules of the LLM.
        index: index of the layer.
        probe: swaps the attention kernel of a module for one that records.
        hidden: the input of the layer, `[rows, width, dim]`.
        kwargs: the keyword inputs of the layer.
        is_rotated: whether position embeddings are applied.
    """
    layer, traces = modules.layers[index], {index: LayerTrace()}
    arguments = {**kwargs, **{name: None for name in ("cache", "past_key_values") if name in kwargs}}
    if not is_rotated:
        arguments["position_embeddings"] = without_rotation(kwargs["position_embeddings"])

    def stop(*record: Any) -> None:
        _store(traces, index, *record)
        raise _StopLayerError

    forward: Callable[..., Any] = layer.forward
    with torch.no_grad(), probe(getattr(layer, modules.attention), stop), suppress(_StopLayerError):
        forward(hidden, **{name: value for name, value in arguments.items() if name != "hidden_states"})
    return traces[index]


def without_rotation(embeddings: Any) -> Any:
    """Return position embeddings that rotate nothing: cosines 1 and sines 0, or complex ones.

    Args:
        embeddings: the position embeddings of a layer: a pair (cosines, sines) or a complex tensor.
    """
    if isinstance(embeddings, Tensor):
        return torch.ones_like(embeddings)
    cosines, sines = embeddings
    return torch.ones_like(cosines), torch.zeros_like(sines)


def attend(trace: LayerTrace, queries: Tensor) -> Tensor:
    """Return the attention of queries to all entries, float32 `[rows, heads, queries, width]`.

    Args:
        trace: the trace of a layer.
        queries: entry of each query, `[rows, queries]`.
    """
    query, key = require(trace.query), require(trace.key)
    index = queries[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    taken, groups = query.gather(2, index).float(), query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(groups, dim=1)
    logits = taken @ keys.transpose(2, 3) * trace.scaling
    return logits.masked_fill(~trace.visible(queries)[:, None], -torch.inf).softmax(dim=-1)
