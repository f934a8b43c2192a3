"""The capability of adapters whose tower and language model run as compiled graphs."""

from __future__ import annotations

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenprune.capabilities import Compilable
from tokenprune.compiled import CompiledLLM, CompileOptions
from tokenprune.models._base.compiled_decoder import CompiledDecoder
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._capture.compiled_tower import CompiledTower

COMPILED_KERNELS = frozenset({"sdpa", "eager"})
"""Attention kernels without steps that depend on values of the mask."""


class CompilableAdapter(PlaceholderAdapter, Compilable):
    """A family whose tower, prefill and decoding step are single graphs for `torch.compile`."""

    def compile_parts(self, options: CompileOptions, multiple: int) -> CompiledLLM:
        """Return the compiled language model, and encode images with a compiled tower from now on.

        Raises:
            ValueError: if a part of this model is no single graph; the error names the part.
        """
        if problem := self._describe_obstacle():
            raise ValueError(f"compile=True does not support this {type(self.model).__name__}: {problem}")
        self.compiled_tower = CompiledTower(self.tower, self.layers_path, options)
        return CompiledDecoder(self.model, self.decoder, options, multiple)

    def _describe_obstacle(self) -> str | None:
        """Return why a part of the model is no single graph; None if all parts are."""
        kernels = {module.config._attn_implementation for module in (self.tower, self.decoder)}
        if kernels - COMPILED_KERNELS:
            names = ", ".join(sorted(map(str, kernels - COMPILED_KERNELS)))
            return f"its attention kernel is {names}; load it with attn_implementation='sdpa'"
        devices = {str(device) for device in (getattr(self.model, "hf_device_map", None) or {}).values()}
        if len(devices) > 1 or devices & {"cpu", "disk"}:
            return f"its weights are on several devices ({', '.join(sorted(devices))}) and move between them"
        quantizer = getattr(self.model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_compileable:
            return f"its quantization ({type(quantizer).__name__}) has no compiled kernels"
        layers = {type(layer).__name__ for layer in DynamicCache(config=self.decoder.config).layers}
        if layers != {DynamicLayer.__name__}:
            return f"its LLM has layers whose cache is not only appended to ({', '.join(sorted(layers))})"
        return None
