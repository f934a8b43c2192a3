"""The computation of one LLM layer in a prefill, and the attention rows that follow from it without a full map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.image import MissingSignalError

CHUNK_ELEMENTS = 1 << 24
"""Largest number of attention weights that are computed at a time."""


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """Inputs and intermediate results of one decoder layer in a prefill. Fields that no signal requires are None.

    Args:
        hidden: hidden states that enter the layer, `[rows, width, dim]`.
        query: queries with position embeddings, `[rows, heads, width, head_dim]`.
        key: keys with position embeddings, `[rows, kv_heads, past + width, head_dim]`; a static cache has more entries.
        mask: the attention mask of the kernel: None, bool or float `[rows or 1, heads or 1, width, keys]`, or
            `[rows, keys]` (flash kernels).
        scaling: factor on the dot products of queries and keys.
        rotary: cosines and sines of the position embeddings side by side, `[rows or 1, width, 2 * head_dim]`.
        transition: for attention and MLP, the ratio of the norms of output and input, and 1 - cos(input, output),
            `[rows, width, modules, 2]`.
        past: number of keys before the first query, or a tensor with this number.
        is_causal: whether a mask that is not four-dimensional implies that queries read earlier keys only.
        window: number of keys that a query reads in a flash kernel; None means all keys.
    """

    hidden: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    scaling: float = 1.0
    rotary: Tensor | None = None
    transition: Tensor | None = None
    past: int | Tensor = 0
    is_causal: bool = True
    window: int | None = None

    def take_rows(self, step: int) -> LayerTrace:
        """Return the trace of every `step`-th row: the first repetition of each prompt.

        Args:
            step: number of repetitions of each prompt.
        """
        names = ("hidden", "query", "key", "mask", "rotary", "transition")
        values = {name: getattr(self, name) for name in names}
        taken = {name: value[::step] for name, value in values.items() if value is not None and len(value) > 1}
        return self if step == 1 else replace(self, **taken)


def compute_attention(trace: LayerTrace, rows: Tensor, positions: Tensor) -> Tensor:
    """Return the attention of queries to all keys, float32 `[n, heads, queries, keys]`.

    The softmax covers the keys that each query reads.

    Args:
        trace: the layer, with queries and keys.
        rows: a row of the trace for each group of queries, `[n]`.
        positions: the positions of the queries in the width of the trace, `[n, queries]`.
    """
    query, key = require_traced(trace.query), require_traced(trace.key)
    query = query[rows[:, None], :, positions].transpose(1, 2)
    return _attend(trace, query, key[rows], rows, positions)


def iterate_attention(trace: LayerTrace, rows: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """Yield the attention of queries to all keys, some queries at a time, float32 `[n, heads, chunk, keys]`.

    Args:
        trace: the layer, with queries and keys.
        rows: a row of the trace for each group of queries, `[n]`.
        positions: the positions of the queries in the width of the trace, `[n, queries]`.
    """
    query, key = require_traced(trace.query), require_traced(trace.key)
    keys, chunk = key[rows], max(1, CHUNK_ELEMENTS // max(1, len(rows) * query.shape[1] * key.shape[2]))
    for part in positions.split(chunk, dim=1):
        yield _attend(trace, query[rows[:, None], :, part].transpose(1, 2), keys, rows, part)


def require_traced(value: Tensor | None) -> Tensor:
    """Return a field of a trace, or raise an error if the signal that requires it was not traced."""
    if value is None:
        raise MissingSignalError("the layer was not traced for this kind of signal; pass the kind to `trace_layers`")
    return value


def _attend(trace: LayerTrace, query: Tensor, key: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Return attention weights, float32 `[n, heads, queries, keys]`.

    Args:
        trace: the layer.
        query: `[n, heads, queries, head_dim]`.
        key: `[n, kv_heads, keys, head_dim]`.
        rows: the row of the trace of each group, `[n]`.
        positions: positions of the queries, `[n, queries]`.
    """
    if query.dtype == torch.float16:  # its largest number is 65,504, and the kernels accumulate in float32
        query, key = query.float(), key.float()
    group = query.shape[1] // key.shape[1]  # query heads of a group share their keys
    grouped = query.unflatten(1, (-1, group)).flatten(2, 3)
    logits = (grouped @ key.transpose(-1, -2)).unflatten(2, (group, -1)).flatten(1, 2) * trace.scaling
    mask = trace.mask
    if mask is not None and mask.dim() == 4:
        full = mask.expand(len(require_traced(trace.key)), -1, -1, -1)
        selected = full[rows[:, None], :, positions, : logits.shape[-1]].transpose(1, 2)
        if selected.dtype != torch.bool:
            return (logits + selected).softmax(dim=-1, dtype=torch.float32)
    else:
        selected = _visible_keys(trace, rows, positions, logits.shape[-1])
    logits = logits.masked_fill(~selected, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1, dtype=torch.float32)


def _visible_keys(trace: LayerTrace, rows: Tensor, positions: Tensor, keys: int) -> Tensor:
    """Return the keys that queries read under a mask that is not four-dimensional, bool `[n, 1, queries, keys]`."""
    places = torch.arange(keys, device=positions.device)
    queries = (positions + trace.past)[:, None, :, None]
    visible = places <= queries if trace.is_causal else places.expand(*queries.shape[:3], -1) >= 0
    if trace.window is not None:
        visible = visible & (queries - places < trace.window)
    if trace.mask is not None:
        visible = visible & trace.mask[rows, :keys].bool()[:, None, None]
    return visible
