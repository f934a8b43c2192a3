"""Key-value caches that hold a reduced prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def find_reduced_cache(inputs: Mapping[str, Any]) -> Any:
    """Return the key-value cache of a call if it holds a reduced prompt, else None.

    Args:
        inputs: keyword inputs of `forward` or `generate`.
    """
    cache: Any = inputs.get("past_key_values") or inputs.get("cache")  # renamed in transformers 5.24
    is_reduced = getattr(cache, "holds_reduced_prompt", False) and cache.get_seq_length() > 0
    return cache if is_reduced else None
