"""Comparison of whole outputs of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def list_differences(first: Any, second: Any, path: str = "output") -> list[str]:
    """List the paths at which two outputs differ in type, order of fields, shape or one bit of a value."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return [] if first.shape == second.shape and torch.equal(first, second) else [path]
    if type(first) is not type(second):
        return [f"{path}: {type(first).__name__} and {type(second).__name__}"]
    if isinstance(first, dict):
        if list(first) != list(second):
            return [f"{path}: {list(first)} and {list(second)}"]
        return [
            difference for name in first for difference in list_differences(first[name], second[name], f"{path}.{name}")
        ]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{path}: {len(first)} and {len(second)} entries"]
        pairs = enumerate(zip(first, second, strict=True))
        return [difference for number, pair in pairs for difference in list_differences(*pair, f"{path}[{number}]")]
    if hasattr(first, "layers"):  # a cache
        states = [
            [[getattr(layer, name, None) for name in ("keys", "values")] for layer in cache.layers]
            for cache in (first, second)
        ]
        return list_differences(*states, f"{path}.layers")
    return [] if first == second else [path]
