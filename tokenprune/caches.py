"""Key-value caches that hold a reduced prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Cache


def mark_caches(values: Any) -> None:
    """Mark the key-value caches in the inputs or outputs of a call as caches of a reduced prompt.

    The mark remains on the cache object and its copies after the block.

    Args:
        values: a mapping or a tuple; values of other types are ignored.
    """
    items = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else ()
    for item in items:
        if isinstance(item, Cache):
            item.holds_reduced_prompt = True  # type: ignore[attr-defined]


def find_cache(inputs: Mapping[str, Any]) -> Any:
    """Return the key-value cache in the inputs or outputs of a model or of one of its layers; None without a cache.

    Args:
        inputs: keyword inputs of `forward` or `generate`, or an output object.
    """
    cache = inputs.get("cache")  # the name since transformers 5.24
    return inputs.get("past_key_values") if cache is None else cache


def name_cache_argument(model: nn.Module) -> str:
    """Return the name of the argument of `forward` that takes a key-value cache.

    It is ``"cache"`` since transformers 5.24, and ``"past_key_values"`` before.

    Args:
        model: a transformers model.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def count_cached(inputs: Mapping[str, Any]) -> int:
    """Return the length of the sequence in the key-value cache of a call; 0 without a cache.

    Args:
        inputs: keyword inputs of `forward` or `generate`.
    """
    cache = find_cache(inputs)
    return 0 if cache is None else int(cache.get_seq_length())


def find_reduced_cache(inputs: Mapping[str, Any]) -> Any:
    """Return the key-value cache of a call if it holds a reduced prompt, else None.

    Args:
        inputs: keyword inputs of `forward` or `generate`.
    """
    cache = find_cache(inputs)
    is_reduced = getattr(cache, "holds_reduced_prompt", False) and cache.get_seq_length() > 0
    return cache if is_reduced else None
