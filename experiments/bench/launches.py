"""Counts the work that the host issues to a device: kernel launches and waits on CUDA, dispatched operators elsewhere.

A GPU that waits for its host shows neither in FLOPs nor in a ratio measured on a CPU. These counts show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

CUDA_EVENTS: Mapping[str, tuple[str, ...]] = {
    "kernel launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "graph launches": ("cudaGraphLaunch",),
    "copies to the host": ("Memcpy DtoH",),
    "blocking waits": ("cudaStreamSynchronize",),
}
"""Names of the profiler's events by count. Names of copies continue with the kind of memory: ``(Device -> Pageable)``.

The benchmark itself waits with `cudaDeviceSynchronize`, which is not counted. A copy of a pageable tensor and a read of
a value wait with `cudaStreamSynchronize`.
"""
OPERATORS = "dispatched operators"
"""Name of the count of devices other than CUDA."""


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run inside the block.

    Attributes:
        number: operators so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        self.number += 1
        return func(*args, **(kwargs or {}))


def count_events(events: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the number of events of each kind of `CUDA_EVENTS`.

    Args:
        events: names of profiler events with their numbers.
    """
    counts = dict.fromkeys(CUDA_EVENTS, 0)
    for name, number in events:
        for kind, names in CUDA_EVENTS.items():
            if name.partition(" (")[0] in names:
                counts[kind] += number
    return counts


class LaunchRecorder(profile):
    """Profiles a CUDA device inside the block, and counts kernel launches and waits at its end.

    Attributes:
        counts: the counts of `CUDA_EVENTS`; empty inside the block.
    """

    def __init__(self) -> None:
        super().__init__(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self.counts: dict[str, int] = {}

    def __exit__(self, *error: Any) -> None:
        """Wait for the device, stop the profiler, and count the events."""
        torch.cuda.synchronize()
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.counts = count_events((event.key, event.count) for event in self.key_averages())
