"""Counts what kernels do while a model runs on the meta device: FLOPs, bytes that they move, bytes that are alive."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import AttentionInterface

FUSED = "tokenprune_fused"
"""Name under which transformers finds `fused_attention`."""


@dataclass
class Work:
    """What one phase of a run does.

    Args:
        kernels: how many kernels there are by (FLOPs, bytes read and written).
        modules: FLOPs by module, as torch's FlopCounterMode names modules.
        flops: FLOPs as FlopCounterMode counts them.
        read_once: bytes of everything that the phase finds in memory and uses, weights and caches, each once.
        peak_bytes: most bytes alive at once beside the weights, whatever phase made them.
    """

    kernels: Counter[tuple[int, int]] = field(default_factory=Counter)
    modules: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0
    read_once: int = 0
    peak_bytes: int = 0

    @property
    def moved(self) -> int:
        """Bytes that all kernels read and write."""
        return sum(number * moved for (_, moved), number in self.kernels.items())


class Meter(TorchDispatchMode):
    """Follows every kernel. Tensors that were there before are the weights; all others are tracked until they die.

    Tensors on the CPU that meet one on the meta device are taken as if they were there, too: sizes must be real numbers
    for the model's own arithmetic on layouts.

    Args:
        device: where tensors are followed: on the meta device, or on that of a model that really runs.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live = 0
        self.phases = 0
        self.work = Work()
        self._alive: dict[int, tuple[int, int]] = {}
        self._found: dict[int, int] = {}

    @contextmanager
    def phase(self) -> Iterator[Work]:
        """Count what happens in the block; what stays alive is followed into the next one."""
        self.phases += 1
        self._found, self.work = {}, Work(peak_bytes=self.live)
        with self, FlopCounterMode(display=False) as counter:
            yield self.work
        self.work.flops = counter.get_total_flops()
        self.work.modules = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        self.work.read_once = sum(self._found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one kernel and count it."""
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if any(one.is_meta for one in given) and not all(one.is_meta for one in given):
            args, kwargs = tree_map_only(Tensor, lambda one: one.to("meta"), (args, kwargs))
            given = list(_tensors((args, kwargs)))
        out = func(*args, **kwargs)
        made = list(_tensors(out))
        read = {_key(one): _bytes(one) for one in given}
        is_view = bool(given) and not func._schema.is_mutable and all(_key(one) in read for one in made)
        for key, size in read.items():
            if not is_view and self._alive.get(key, (0, 0))[0] != self.phases:
                self._found[key] = max(size, self._found.get(key, 0))
        for one in made:
            if _key(one) not in read:
                self._track_alloc(one.untyped_storage())
        if given and not is_view and any(one.is_meta for one in given):
            moved = sum(read.values()) + sum(map(_bytes, made))
            count = flop_registry.get(func._overloadpacket)
            flops = int(count(*args, **kwargs, out_val=out)) if count else 0
            self.work.kernels[flops, moved] += 1
        return out

    def _track_alloc(self, storage: Any) -> None:
        if storage._cdata in self._alive or storage.device.type != self.device:
            return
        self._alive[storage._cdata] = (self.phases, storage.nbytes())
        self.live += storage.nbytes()
        self.work.peak_bytes = max(self.work.peak_bytes, self.live)
        weakref.finalize(storage, self._track_free, storage._cdata).atexit = False

    def _track_free(self, key: int) -> None:
        self.live -= self._alive.pop(key)[1]


def _tensors(values: Any) -> Iterator[Tensor]:
    """Return the tensors among arguments or results; torch's own walk over trees takes longer than the kernels."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for one in values:
            yield from _tensors(one)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _bytes(tensor: Tensor) -> int:
    """Return the bytes behind a tensor; an expanded one has fewer than it shows."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention in one kernel that never writes its scores: what SDPA and flash attention run on a GPU.

    On the meta device SDPA falls back to plain products, so the kernel is called by name.

    Args:
        module: the attention module.
        query: `[rows, heads, length, dim]`.
        key: `[rows, key heads, keys, dim]`.
        value: as ``key``.
        attention_mask: never given, since rows have no padding here.
        kwargs: what transformers passes to attention functions.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (
            one[:, :, None].expand(-1, -1, groups, -1, -1).reshape(one.shape[0], -1, *one.shape[2:]).detach()
            for one in (key, value)
        )
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = flash(query, key, value, 0.0, bool(causal and query.shape[2] > 1))[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, fused_attention)
