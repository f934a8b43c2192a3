"""Traces decoder layers of an LLM in a prefill, with any attention kernel.

The attention modules of traced layers get a config that names a private kernel (`hooks.py`), between the pre-hook and
the forward hook of their layer. In decode steps no config is swapped and nothing is recorded.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from tokenprune.capabilities import DecoderModules
from tokenprune.decoder.trace import LayerTrace
from tokenprune.hooks import Hook
from tokenprune.models._capture.hooks import CAPTURE_CONTEXT, build_private_config

TRACE_KERNEL, FLASH_TRACE_KERNEL = "tokenprune_trace", "tokenprune_flash_trace"
"""Private names in transformers' attention interface."""
QUERY_KINDS = frozenset({"last_text_attention", "text_attention", "visual_attention"})
"""Kinds of signals that are computed from queries and keys."""
KEY_KINDS = QUERY_KINDS | {"llm_keys", "text_keys"}
"""Kinds of signals that are computed from keys."""
HIDDEN_KINDS = frozenset({"llm_hidden", "text_hidden"})
"""Kinds of signals that are computed from the input of a layer."""
CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache among the inputs of a layer, in the supported versions of transformers."""

KernelHandler = Callable[..., None]
"""Receives the attention module, queries, keys, the mask, and the keyword arguments of the kernel."""


class _Local(threading.local):
    """The handlers of the kernels that this thread intercepts, by attention module."""

    def __init__(self) -> None:
        self.handlers: dict[nn.Module, KernelHandler] = {}


_LOCAL, _SWAP_LOCK = _Local(), threading.Lock()


def _intercept(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Call the handler of this thread, then the kernel of the original config."""
    handler = _LOCAL.handlers.get(module)
    if handler is not None:
        with torch.no_grad(), CAPTURE_CONTEXT.get()():
            handler(module, query.detach(), key.detach(), attention_mask, kwargs)
    # Flash attention reads the name of its kernel in the config. Other threads may run the module at the same time.
    original_module: Any = copy.copy(module)
    original_module.config = _original_config(module)
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(original_module.config._attn_implementation, eager)
    return kernel(original_module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(TRACE_KERNEL, _intercept)
AttentionInterface.register(FLASH_TRACE_KERNEL, _intercept)


def _original_config(attention: Any) -> Any:
    """Return the original config of an attention module."""
    return getattr(attention.config, "tokenprune_original", attention.config)


@contextmanager
def intercepted_kernel(attention: Any, handler: KernelHandler) -> Iterator[None]:
    """Call a handler before the attention kernel of a module, in this thread and inside the block.

    Args:
        attention: the attention module. Blocks may be nested, also in several threads.
        handler: the handler; it replaces the handler of an outer block.
    """
    previous = _LOCAL.handlers.get(attention)
    with _SWAP_LOCK:
        if not hasattr(attention.config, "tokenprune_users"):
            names = (TRACE_KERNEL, FLASH_TRACE_KERNEL)
            attention.config = build_private_config(attention.config, names, tokenprune_users=0)
        attention.config.tokenprune_users += 1
    try:
        _LOCAL.handlers[attention] = handler
        yield
    finally:
        if previous is None:
            _LOCAL.handlers.pop(attention, None)
        else:
            _LOCAL.handlers[attention] = previous
        with _SWAP_LOCK:
            attention.config.tokenprune_users -= 1
            if not attention.config.tokenprune_users:
                attention.config = attention.config.tokenprune_original


def _describe_kernel_call(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, arguments: Mapping[str, Any], past: Any
) -> dict[str, Any]:
    """Return the fields of a `LayerTrace` that an attention kernel receives.

    Args:
        module: the attention module.
        query: `[rows, heads, width, head_dim]`.
        key: `[rows, kv_heads, keys, head_dim]`.
        mask: the attention mask.
        arguments: keyword arguments of the kernel.
        past: number of earlier keys in a static cache; None for another cache.
    """
    scaling, is_causal = arguments.get("scaling"), arguments.get("is_causal")
    extra = key.shape[2] - query.shape[2]
    is_flash = is_flash_attention_requested(_original_config(module))
    return {
        "query": query,
        "key": key,
        "mask": mask,
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "past": extra if past is None or not extra else past,
        "is_causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
        "window": arguments.get("sliding_window") if is_flash else None,
    }


def _find_cache_layer(kwargs: Mapping[str, Any], attention: Any) -> Any:
    """Return the cache layer of an attention module among the inputs of its decoder layer; None without a cache."""
    cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    index = getattr(attention, "layer_idx", None)
    layers = getattr(cache, "layers", ())
    return layers[index] if index is not None and index < len(layers) else None


def _count_static(cache_layer: Any) -> Any:
    """Return the number of stored keys of a static cache layer, a number or a tensor; None for other layers."""
    if not isinstance(cache_layer, StaticLayer):
        return None
    stored: Any = StaticLayer.get_seq_length(cache_layer)  # a narrow layer overrides it
    return stored.clone() if isinstance(stored, Tensor) else stored


class _Recording:
    """The traces of the prefill in progress of one thread.

    Args:
        store: receives the trace of each layer.
    """

    def __init__(self, store: MutableMapping[int, LayerTrace]) -> None:
        self.store = store
        self.layers: dict[int, tuple[dict[str, Any], ExitStack]] = {}
        """Fields and contexts of each layer that runs."""

    def leave(self, index: int) -> dict[str, Any] | None:
        """Leave the contexts of a layer, and return its fields; None if the layer was not entered."""
        fields, stack = self.layers.pop(index, (None, None))
        if stack is not None:
            stack.close()
        return fields

    def close(self) -> None:
        """Leave the contexts of all layers: torch runs no hook after Ctrl-C."""
        for index in list(self.layers):
            self.leave(index)


class DecoderTracer:
    """Traces decoder layers of an LLM.

    Args:
        modules: the modules of the LLM.
        kinds_by_layer: kinds of signals by layer index.

    Raises:
        ValueError: if a layer without attention is traced for a signal of attention.
    """

    def __init__(self, modules: DecoderModules, kinds_by_layer: Mapping[int, frozenset[str]]) -> None:
        self._modules, self._kinds_by_layer, self._local = modules, kinds_by_layer, threading.local()
        for index, kinds in kinds_by_layer.items():
            if index not in modules.attention_layers and kinds - HIDDEN_KINDS:
                raise ValueError(
                    f"layer {index} of the LLM has no attention, which {', '.join(sorted(kinds - HIDDEN_KINDS))} "
                    f"reads; layers with attention: {', '.join(map(str, modules.attention_layers))}"
                )

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the hooks on the traced layers inside the block; they run after hooks that were placed before."""
        with ExitStack() as undo:
            for index, kinds in self._kinds_by_layer.items():
                layer = self._modules.layers[index]
                enter, leave = Hook(partial(self._enter, index, kinds)), Hook(partial(self._leave, index))
                undo.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                undo.callback(layer.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)
                if "token_transition" in kinds:
                    for name in (self._modules.attention, self._modules.mlp):
                        hook = Hook(partial(self._compare, index))
                        module: nn.Module = getattr(layer, name)
                        undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def record_into(self, store: MutableMapping[int, LayerTrace]) -> Iterator[None]:
        """Record the traced layers in this thread and inside the block, each layer once.

        Args:
            store: receives the trace of each layer by layer index.
        """
        previous, recording = self._recording, _Recording(store)
        self._local.recording = recording
        try:
            yield
        finally:
            self._local.recording = previous
            recording.close()

    @property
    def _recording(self) -> _Recording | None:
        return getattr(self._local, "recording", None)

    def _enter(
        self, index: int, kinds: frozenset[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == 1:  # a decode step: recognized by its shape only, so that it compiles to one graph
            return
        recording = self._recording
        if recording is None or index in recording.store:
            return
        recording.leave(index)  # an earlier run was interrupted
        fields: dict[str, Any] = {"hidden": hidden.detach()} if kinds & HIDDEN_KINDS else {}
        if "rotary_similarity" in kinds:
            fields["rotary"] = join_rotary(kwargs["position_embeddings"])
        stack = ExitStack()
        recording.layers[index] = fields, stack
        if kinds & KEY_KINDS:
            attention = getattr(module, self._modules.attention)
            past = _count_static(_find_cache_layer(kwargs, attention))

            def record(attention: Any, query: Tensor, key: Tensor, mask: Any, arguments: Mapping[str, Any]) -> None:
                fields.update(_describe_kernel_call(attention, query, key, mask, arguments, past))
                if not kinds & QUERY_KINDS:
                    fields.update(query=None, mask=None)

            stack.enter_context(intercepted_kernel(attention, record))

    def _leave(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == 1:
            return
        recording = self._recording
        fields = None if recording is None else recording.leave(index)
        if recording is None or fields is None or output is None:  # without output, the layer raised an error
            return
        parts = fields.pop("parts", None)
        if parts:
            fields["transition"] = torch.stack(parts, dim=2)
        recording.store[index] = LayerTrace(**fields)

    def _compare(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Compare input and output of the attention or MLP of a layer that runs."""
        inputs = args[0] if args else kwargs["hidden_states"]
        if inputs.shape[1] == 1:
            return
        recording = self._recording
        if recording is None or index not in recording.layers:
            return
        outputs = output[0] if isinstance(output, tuple) else output
        with torch.no_grad(), CAPTURE_CONTEXT.get()():
            change = measure_change(inputs, outputs.reshape(inputs.shape))
        recording.layers[index][0].setdefault("parts", []).append(change)


def measure_change(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the ratio of the norms of outputs and inputs, and 1 - cos(inputs, outputs), float32 `[rows, width, 2]`.

    Args:
        inputs: the inputs of a module, `[rows, width, dim]`.
        outputs: its outputs, `[rows, width, dim]`.
    """
    inputs, outputs = inputs.float(), outputs.float()
    ratio = outputs.norm(dim=-1) / inputs.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack([ratio, 1 - torch.cosine_similarity(inputs, outputs, dim=-1)], dim=-1)


class _KernelReached(BaseException):
    """Stops a layer at its kernel; no base class of it is caught inside a layer."""


@lru_cache(maxsize=64)
def _parameter_names(kind: Any) -> tuple[str, ...]:
    """Return the names of the positional inputs of a class of layers."""
    return tuple(signature(kind.forward).parameters)[1:]


def ask_layer(
    modules: DecoderModules, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], rotated: bool = True
) -> LayerTrace:
    """Return the queries and keys that a layer would compute; the layer stops before its attention kernel.

    The cache does not change: keys of earlier forward passes are read from a copy of its layer.

    Args:
        modules: the modules of the LLM.
        index: index of the layer.
        args: positional inputs of the layer.
        kwargs: keyword inputs of the layer.
        rotated: whether position embeddings are applied.

    Raises:
        ValueError: if the layer has no attention.
    """
    layer: Any = modules.layers[index]
    attention: Any = getattr(layer, modules.attention, None)
    if attention is None:
        raise ValueError(f"layer {index} of the LLM has no attention; cut at {modules.attention_layers}")
    inputs = {**dict(zip(_parameter_names(layer.__class__), args, strict=False)), **kwargs}
    cache_layer = _find_cache_layer(inputs, attention)
    past, fields = _count_static(cache_layer), dict[str, Any]()
    for name in CACHE_NAMES:
        if inputs.get(name) is not None:
            inputs[name] = _copy_cache(inputs[name], attention.layer_idx, cache_layer)
    if not rotated:
        inputs["position_embeddings"] = _without_rotation(inputs.get("position_embeddings"))

    def record(attention: Any, query: Tensor, key: Tensor, mask: Any, arguments: Mapping[str, Any]) -> None:
        fields.update(_describe_kernel_call(attention, query, key, mask, arguments, past))
        raise _KernelReached

    try:
        with torch.no_grad(), intercepted_kernel(attention, record):
            layer.forward(**inputs)
    except _KernelReached:
        pass
    return LayerTrace(hidden=inputs["hidden_states"].detach(), **fields)


def _copy_cache(cache: Any, index: int, cache_layer: Any) -> Any:
    """Return a cache with a copy of a layer; None if the layer stores no keys."""
    if not getattr(cache_layer, "is_initialized", False):
        return None
    copied = copy.copy(cache)
    copied.layers = [*cache.layers]
    copied.layers[index] = copy.deepcopy(cache_layer)
    return copied


def join_rotary(embeddings: Any) -> Tensor:
    """Return cosines and sines of position embeddings side by side, `[rows or 1, width, 2 * head_dim]`.

    Args:
        embeddings: a pair (cosines, sines), or a complex tensor with one number for two dimensions of a head.
    """
    if isinstance(embeddings, tuple):
        return torch.cat(list(embeddings), dim=-1)
    return torch.cat([embeddings.real, embeddings.imag], dim=-1).repeat_interleave(2, dim=-1)


def _without_rotation(embeddings: Any) -> Any:
    """Return position embeddings that rotate nothing: cos = 1 and sin = 0, or complex ones."""
    if isinstance(embeddings, tuple):
        cos, sin = embeddings
        return torch.ones_like(cos), torch.zeros_like(sin)
    return None if embeddings is None else torch.ones_like(embeddings)
