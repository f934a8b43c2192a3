"""Counts the FLOPs, moved bytes and live bytes of all kernels while a model runs on the meta device."""

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
"""Name of `fused_attention` in the attention interface of transformers."""


@dataclass
class Work:
    """Counted work of one phase.

    Args:
        kernels: number of kernels by (FLOPs, bytes read and written).
        modules: FLOPs by module, with the module names of torch's FlopCounterMode.
        flops: FLOPs, as counted by FlopCounterMode.
        read_once: bytes of all tensors from before the phase that it reads (weights and caches), each counted once.
        peak_bytes: maximum of the live bytes without the weights; tensors of earlier phases are included.
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
    """Counts every kernel. Tensors from before the first phase are weights; new tensors are tracked until freed.

    If a kernel combines a CPU tensor with a meta tensor, the CPU tensor is moved to the meta device. Size tensors must
    stay on the CPU until then, because the model computes layouts from their values.

    Args:
        device: type of the device whose tensors are tracked: ``"meta"``, or the device of a model with values.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live = 0
        self.phases = 0
        self.work = Work()
        self._alive: dict[int, tuple[int, int]] = {}
        self._read_sizes: dict[int, int] = {}

    @contextmanager
    def phase(self) -> Iterator[Work]:
        """Count the work of the block. Tensors that outlive the block remain tracked in the next one."""
        self.phases += 1
        self._read_sizes, self.work = {}, Work(peak_bytes=self.live)
        with self, FlopCounterMode(display=False) as counter:
            yield self.work
        self.work.flops = counter.get_total_flops()
        self.work.modules = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        self.work.read_once = sum(self._read_sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one kernel and count it."""
        kwargs = kwargs or {}
        operands = list(_iterate_tensors((args, kwargs)))
        if any(tensor.is_meta for tensor in operands) and not all(tensor.is_meta for tensor in operands):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            operands = list(_iterate_tensors((args, kwargs)))
        out = func(*args, **kwargs)
        results = list(_iterate_tensors(out))
        sizes = {_storage_key(tensor): _storage_bytes(tensor) for tensor in operands}
        is_view = (
            bool(operands) and not func._schema.is_mutable and all(_storage_key(tensor) in sizes for tensor in results)
        )
        for key, size in sizes.items():
            if not is_view and self._alive.get(key, (0, 0))[0] != self.phases:
                self._read_sizes[key] = max(size, self._read_sizes.get(key, 0))
        for tensor in results:
            if _storage_key(tensor) not in sizes:
                self._track_alloc(tensor.untyped_storage())
        if operands and not is_view and any(tensor.is_meta for tensor in operands):
            moved = sum(sizes.values()) + sum(map(_storage_bytes, results))
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


def _iterate_tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results. Torch's generic tree traversal takes longer than the kernels."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _iterate_tensors(value)
    elif isinstance(values, dict):
        yield from _iterate_tensors(list(values.values()))


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _storage_bytes(tensor: Tensor) -> int:
    """Return the stored bytes of a tensor. An expanded tensor has fewer bytes than its shape suggests."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention `[rows, length, heads, dim]` in one kernel that never writes its scores.

    SDPA and flash attention run such a kernel on a GPU. On the meta device SDPA falls back to separate products, so
    this function calls the kernel by name.

    Args:
        module: the attention module.
        query: `[rows, heads, length, dim]`.
        key: `[rows, key heads, keys, dim]`.
        value: as ``key``.
        attention_mask: always None, because rows have no padding here.
        kwargs: remaining arguments that transformers passes to attention functions.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (
            tensor[:, :, None].expand(-1, -1, groups, -1, -1).reshape(tensor.shape[0], -1, *tensor.shape[2:]).detach()
            for tensor in (key, value)
        )
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = flash(query, key, value, 0.0, bool(causal and query.shape[2] > 1))[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, fused_attention)
