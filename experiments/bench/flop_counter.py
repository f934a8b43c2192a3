"""Counts the FLOPs of fused attention kernels without the blocks that a causal flag masks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

ATEN = torch.ops.aten
SDPA_ON_CPU = ATEN._scaled_dot_product_flash_attention_for_cpu
FUSED_ATTENTION = {
    SDPA_ON_CPU: 4,
    ATEN._scaled_dot_product_flash_attention: 4,
    ATEN._scaled_dot_product_efficient_attention: 6,
    ATEN._scaled_dot_product_cudnn_attention: 6,
}
"""Torch's kernels of scaled dot product attention, with the position of ``is_causal`` among their arguments."""


def attention_flops(
    causal_position: int, *args: Any, is_causal: bool = False, out_shape: Any = None, **kwargs: Any
) -> int:
    """Return the FLOPs of a fused attention kernel, without the blocks that a causal flag masks.

    With the causal flag these kernels skip the blocks above the diagonal. A mask that is passed as a tensor skips
    nothing. Torch's own counter always counts the full square, and has no entry for the CPU kernel.

    Args:
        causal_position: position of ``is_causal`` among the arguments.
        args: arguments of the kernel, with tensors replaced by their shapes; queries, keys and values come first.
        is_causal: the flag, if it was passed by name.
        out_shape: shapes of the results; not used.
        kwargs: remaining keyword arguments of the kernel; not used.
    """
    square = int(sdpa_flop_count(*args[:3]))
    if not (is_causal or (len(args) > causal_position and args[causal_position])):
        return square
    queries, keys = args[0][-2], args[1][-2]
    side = min(queries, keys)
    visible_pairs = side * (side + 1) // 2 + (queries - side) * keys
    return int(square * visible_pairs // (queries * keys))


def create_flop_counter() -> FlopCounterMode:
    """Return torch's FLOP counter with corrected counts for fused attention (`attention_flops`)."""
    counts = {kernel: partial(attention_flops, position) for kernel, position in FUSED_ATTENTION.items()}
    return FlopCounterMode(display=False, custom_mapping=counts)
