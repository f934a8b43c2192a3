"""Pure functions that compute attention rows and column means from queries and keys, without the full map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, repeat
from torch import Tensor


def cls_logits(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Return the scaled dot products of CLS, the first token, with all other tokens, before the softmax.

    Args:
        query: queries, `[tiles, heads, 1 + tokens, head_dim]`.
        key: keys, `[tiles, key_heads, 1 + tokens, head_dim]`.
        scaling: factor on the dot products.
        bias: bias of each key, `[tiles, 1 + tokens]`; None without a bias.

    Returns:
        float32 `[tiles, heads, tokens]`.
    """
    return _logits(query[:, :, :1], _match_heads(key, query), scaling, bias)[:, :, 0, 1:].float()


def cls_rows(
    query: Tensor, key: Tensor, scaling: float, real: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return the attention of CLS, the first token, to all other tokens.

    Args:
        query: queries, `[tiles, heads, 1 + tokens, head_dim]`.
        key: keys, `[tiles, key_heads, 1 + tokens, head_dim]`.
        scaling: factor on the dot products.
        real: positions that are not padding, bool `[tiles, 1 + tokens]`; None means all positions.
        bias: bias of each key, `[tiles, 1 + tokens]`; None without a bias.

    Returns:
        Softmax over all keys with the CLS key removed, float32 `[tiles, heads, tokens]`.
    """
    logits = _without_padding(_logits(query[:, :, :1], _match_heads(key, query), scaling, bias), real)
    return logits.softmax(dim=-1, dtype=torch.float32)[:, :, 0, 1:]


def joint_row(query: Tensor, key: Tensor) -> Tensor:
    """Return the attention of CLS, the first token, to all other tokens, with all heads joined to one wide head.

    Args:
        query: queries, `[tiles, heads, 1 + tokens, head_dim]`.
        key: keys, `[tiles, key_heads, 1 + tokens, head_dim]`.

    Returns:
        Softmax over all keys, scaled by the joint width, with the CLS key removed, float32 `[tiles, 1, tokens]`.
    """
    key = _match_heads(key, query)
    width = query.shape[1] * query.shape[3]
    query = query[:, :, 0]
    if query.dtype == torch.float16:
        query, key = query.float(), key.float()
    logits: Tensor = einsum(query, key, "tiles heads dim, tiles heads n dim -> tiles n") / width**0.5
    return logits.softmax(dim=-1, dtype=torch.float32)[:, None, 1:]


def received_attention(
    query: Tensor,
    key: Tensor,
    scaling: float,
    prefix: int,
    real: Tensor | None = None,
    chunk: int = 64,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the attention that each token receives, averaged over all queries.

    Processes `chunk` queries at a time, so that no full map exists. On a CPU it also processes one tile at a time,
    which is faster because the data stay in the cache.

    Args:
        query: queries, `[tiles, heads, prefix + tokens, head_dim]`.
        key: keys, `[tiles, key_heads, context + prefix + tokens, head_dim]`. The context of a resampler has keys
            and no queries.
        scaling: factor on the dot products.
        prefix: number of tokens before the visual tokens (1 for CLS). Their queries count; their columns are removed.
        real: keys that are not padding, bool `[tiles, context + prefix + tokens]`; None means all keys.
        chunk: number of queries per step.
        bias: bias of each key, `[tiles, context + prefix + tokens]`; None without a bias.

    Returns:
        Column means of the attention map, float32 `[tiles, heads, tokens]`.
    """
    if query.device.type == "cpu" and len(query) > 1:
        masks = [None] * len(query) if real is None else real.split(1)
        biases = [None] * len(query) if bias is None else bias.split(1)
        tiles = zip(query.split(1), key.split(1), masks, biases, strict=True)
        return torch.cat([received_attention(q, k, scaling, prefix, r, chunk, b) for q, k, r, b in tiles])
    key = _match_heads(key, query)
    total = torch.zeros(*key.shape[:3], dtype=torch.float32, device=query.device)
    context = key.shape[2] - query.shape[2]
    for part, weights in zip(
        torch.split(query, chunk, dim=2), _query_weights(query, real, context, chunk), strict=True
    ):
        rows = _without_padding(_logits(part, key, scaling, bias), real).softmax(dim=-1, dtype=torch.float32)
        total += rows.sum(dim=2) if weights is None else rows.mul_(weights[:, None, :, None]).sum(dim=2)
    n_queries = query.shape[2] if real is None else real[:, context:].float().sum(dim=1)[:, None, None]
    return total[:, :, context + prefix :] / n_queries


def _logits(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Return scaled dot products, `[tiles, heads, queries, keys]`; float16 inputs give float32 to avoid overflow.

    Args:
        query: `[tiles, heads, queries, head_dim]`.
        key: `[tiles, heads, keys, head_dim]`.
        scaling: factor on the dot products.
        bias: bias of each key, `[tiles, keys]`; None without a bias.
    """
    if query.dtype == torch.float16:  # its largest number is 65,504, and the kernels accumulate in float32
        query, key = query.float(), key.float()
    logits = query @ key.transpose(-1, -2)
    logits *= scaling  # in place: for all queries these are large tensors
    if bias is not None:
        logits += bias[:, None, None].to(logits.dtype)
    return logits


def _query_weights(query: Tensor, real: Tensor | None, context: int, chunk: int) -> Sequence[Tensor | None]:
    """Return 0 for padding and 1 for all other queries of each chunk, `[tiles, queries]`; None means all are 1."""
    if real is None:
        return [None] * -(-query.shape[2] // chunk)
    return torch.split(real[:, context:].float(), chunk, dim=1)


def _without_padding(logits: Tensor, real: Tensor | None) -> Tensor:
    """Return logits with -inf at padding keys, `[tiles, heads, queries, keys]`."""
    return logits if real is None else logits.masked_fill(~real[:, None, None], float("-inf"))


def _match_heads(key: Tensor, query: Tensor) -> Tensor:
    """Repeat grouped key heads until they match the query heads."""
    groups = query.shape[1] // key.shape[1]
    return key if groups == 1 else repeat(key, "tiles heads n dim -> tiles (heads groups) n dim", groups=groups)
