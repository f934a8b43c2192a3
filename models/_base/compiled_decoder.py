"""The language model of a transformers model, with prefill and decoding as compiled graphs.

Inside a block, the `forward` of the decoder is replaced. A prefill runs a graph that returns hidden states, keys and
values. The keys and values are then written to the cache of the call, so the graph depends on the width of the prompt
only, and not on the type, length or address of the cache. A decoding step runs a graph that reads and writes a static
cache in place. The address of a static cache is part of a CUDA graph, so its memory is used again in later calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from tokenprune.compiled import CompiledLLM, CompileOptions, GraphCache, compile_function, copy_outputs
from tokenprune.generation import GenerateOptions
from tokenprune.models._capture.hooks import real_positions, replaced_forward

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of the cache argument; transformers 5.24 renamed it."""
CACHE_FIELD = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_ARGUMENTS)
"""Name of the cache in the installed transformers."""
RECORDED = ("output_hidden_states", "output_attentions")
"""Options with which a decoder returns more than the last hidden state; such calls are not compiled."""
UNCOMPILED_DECODING = ("assistant_model", "prompt_lookup_num_tokens", "penalty_alpha", "custom_generate")
"""Options of `generate` whose decoding changes the cache in other ways than by appending tokens."""


class CompiledDecoder(CompiledLLM):
    """The compiled decoder of one live model.

    Args:
        model: the model.
        decoder: its module with the decoder layers.
        options: the compiler.
        multiple: number of which the width of a compiled prefill is a multiple.
    """

    def __init__(self, model: Any, decoder: Any, options: CompileOptions, multiple: int) -> None:
        self._model, self._decoder, self._options, self._multiple = model, decoder, options, multiple
        self._forward: Callable[..., Any] = decoder.forward
        self._graphs = GraphCache()
        self._caches: dict[int, StaticCache] = {}
        """The static cache of each number of rows."""
        self._new_cache: Cache | None = None
        """A static cache that holds no tokens so far."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Run the compiled graphs in `forward` of the decoder, and provide static caches, inside the block."""
        previous = vars(self._model).get("_prepare_static_cache")
        with replaced_forward(self._decoder, self.run):
            self._model._prepare_static_cache = self.provide_cache
            try:
                yield
            finally:
                del self._model._prepare_static_cache
                if previous is not None:
                    self._model._prepare_static_cache = previous
                self._new_cache = None

    def select_cache(self, options: GenerateOptions) -> dict[str, Any]:
        """Return the arguments of `generate` that select a static cache, except for beams and caches of the caller.

        The compilation of transformers is disabled: it would include the hooks of the attached strategy.

        Args:
            options: the options of the call.
        """
        is_passed = any(options.get(name) is not None for name in CACHE_ARGUMENTS)
        is_other = options.get("cache_implementation") not in (None, "static") or options.get("use_cache") is False
        is_reordered = (options.get("num_beams") or 1) > 1 or any(options.get(name) for name in UNCOMPILED_DECODING)
        if is_passed or is_other or is_reordered:
            return {"disable_compile": True}
        return {"cache_implementation": "static", "disable_compile": True}

    def provide_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Return an empty static cache, in place of the method of the model that creates a new one.

        The memory of an earlier cache is used again. If it is too small, a larger cache replaces it.

        Args:
            cache_implementation: the kind of the cache.
            batch_size: number of rows.
            max_cache_len: number of positions of each row.
            args: further arguments of the method of the model.
            kwargs: further arguments of the method of the model.
        """
        if cache_implementation != "static":
            prepare = type(self._model)._prepare_static_cache
            return prepare(self._model, cache_implementation, batch_size, max_cache_len, *args, **kwargs)
        cache = self._caches.get(batch_size)
        if cache is None or cache.get_max_length() < max_cache_len:
            length = -(-max_cache_len // self._multiple) * self._multiple
            with torch.inference_mode(False):  # later calls can run outside of inference mode
                cache = StaticCache(config=self._decoder.config, max_cache_len=length)
        else:
            cache.reset()
        self._caches[batch_size] = self._new_cache = cache
        return cache

    def release_caches(self) -> None:
        """Forget the static caches, because the caller of `generate` received one of them."""
        self._caches.clear()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the decoder: a prefill of a padded prompt or a decoding step runs as a graph."""
        embeds = kwargs.get("inputs_embeds")
        name = next((name for name in CACHE_ARGUMENTS if name in kwargs), CACHE_FIELD)
        cache = kwargs.get(name)
        has_options = any(kwargs.get(option) or getattr(self._decoder.config, option, False) for option in RECORDED)
        if args or embeds is None or has_options:
            return self._forward(*args, **kwargs)
        options = {key: value for key, value in kwargs.items() if key not in (name, "use_cache")}
        is_empty = cache is None or self._is_empty(cache)
        if is_empty and embeds.shape[1] % self._multiple == 0:
            use_cache = kwargs.get("use_cache")
            use_cache = self._decoder.config.use_cache if use_cache is None else use_cache
            if cache is None and use_cache:
                cache = DynamicCache(config=self._decoder.config)
            return self._prefill(options, name, cache)
        if embeds.shape[1] == 1 and any(cache is static for static in self._caches.values()):
            return self._decode(options, name, cache)
        return self._forward(*args, **kwargs)

    def _prefill(self, options: dict[str, Any], name: str, cache: Any) -> BaseModelOutputWithPast:
        """Return the output of a prefill, and write its keys and values to the cache."""
        rows, width = options["inputs_embeds"].shape[:2]
        mask = reduce_mask(options.get("attention_mask"), width)
        forward, config = self._forward, self._decoder.config

        def prefill(**inputs: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
            states: Any = DynamicCache(config=config)
            output = forward(**inputs, **{name: states}, use_cache=True)
            return output.last_hidden_state, [(layer.keys, layer.values) for layer in states.layers]

        run = self._graphs.get(
            ("prefill", rows, width), lambda: compile_function(prefill, self._options, self._describe("prefill"))
        )
        hidden, states = run(**{**options, "attention_mask": mask})
        if cache is not None:
            # Normal tensors, because later calls can run outside of inference mode; `update` copies the states.
            with torch.inference_mode(False), torch.no_grad():
                for index, (keys, values) in enumerate(states):
                    cache.update(keys, values, index)
        return BaseModelOutputWithPast(last_hidden_state=copy_outputs(hidden), **{CACHE_FIELD: cache})

    def _decode(self, options: dict[str, Any], name: str, cache: Any) -> BaseModelOutputWithPast:
        """Return the output of a decoding step, which writes to the static cache."""
        forward = self._forward

        def decode(states: Cache, **inputs: Any) -> Tensor:
            hidden: Tensor = forward(**inputs, **{name: states}, use_cache=True).last_hidden_state
            return hidden

        key = ("decode", len(options["inputs_embeds"]), cache.get_max_length())
        run = self._graphs.get(key, lambda: compile_function(decode, self._options, self._describe("decoding step")))
        hidden = run(cache, **options)
        return BaseModelOutputWithPast(last_hidden_state=copy_outputs(hidden), **{CACHE_FIELD: cache})

    def _is_empty(self, cache: Any) -> bool:
        """Return whether a cache holds no tokens before this pass, without reading its length from the device."""
        is_new = cache is self._new_cache
        if is_new:
            self._new_cache = None
        return is_new or not any(layer.is_initialized for layer in cache.layers)

    def _describe(self, part: str) -> str:
        return f"the {part} of {type(self._model).__name__}"


def reduce_mask(mask: Any, width: int) -> Tensor | None:
    """Return the attention mask of a prompt as the caller passes it, int64 `[rows, width]`; None if there is none.

    `generate` passes a mask per query and position of a static cache. With one kind of mask, plain calls and `generate`
    share a graph.

    Args:
        mask: `[rows, width]`, or `[rows, 1, width, positions]`, or a dictionary of such masks by kind of layer.
        width: width of the prompt.
    """
    mask = next(iter(mask.values())) if isinstance(mask, dict) else mask
    if mask is None:
        return None
    # The copy has the strides of a new tensor, which are a part of the key of a graph.
    return real_positions(mask)[:, :width].long().clone(memory_format=torch.contiguous_format)
