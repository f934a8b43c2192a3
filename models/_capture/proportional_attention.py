"""The attention kernel of merged patches: it adds the logarithm of their sizes to the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from tokenprune.models._capture.hooks import find_kernel

PROPORTIONAL_KERNEL, FLASH_PROPORTIONAL_KERNEL = "tokenprune_proportional", "tokenprune_flash_proportional"
"""Private names in transformers' attention interface; the kernel adds the bias of merged patches to the logits."""


def add_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to the logits of attention, `[tiles, 1, 1 or queries, keys]`.

    Args:
        mask: a mask as kernels take it; None without a mask.
        bias: the bias of each key, `[tiles, keys]`.
        dtype: the dtype of the logits.
    """
    added = bias[:, None, None].to(dtype)
    if mask is None:
        return added
    return added.masked_fill(~mask, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + added


def _proportional_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Add the bias of merged patches to the mask, then call the kernel of the original config.

    Flash kernels accept no bias; the call then uses torch's scaled dot product attention.
    """
    config: Any = module.config
    bias, kernel = config.tokenprune_reduction.key_bias, find_kernel(module)
    if bias is None:
        return kernel(module, query, key, value, attention_mask, **kwargs)
    if is_flash_attention_requested(config.tokenprune_original):
        kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return kernel(module, query, key, value, add_bias(attention_mask, bias, query.dtype), **kwargs)


AttentionInterface.register(PROPORTIONAL_KERNEL, _proportional_attention)
AttentionInterface.register(FLASH_PROPORTIONAL_KERNEL, _proportional_attention)
