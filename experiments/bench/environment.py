"""The machine: waiting for the device, peak memory, and what stands in every result."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import tokenprune


def wait_for(device: torch.device) -> None:
    """Wait until a device has done everything that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Watch the memory of the block, caches emptied before.

    Args:
        device: where the model is.

    Yields:
        Filled when the block ends. CUDA: bytes ``allocated`` and ``reserved`` at the peak, and ``allocated_before``.
        CPU under Linux: bytes ``resident`` at the peak and ``resident_before``. Elsewhere nothing.
    """
    found: dict[str, int] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found["allocated"] = torch.cuda.max_memory_allocated(device)
        found["reserved"] = torch.cuda.max_memory_reserved(device)
        found["allocated_before"] = before
    elif device.type == "cpu" and Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier call has freed is no memory of this one
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
        before = _status("VmRSS")
        yield found
        found["resident"] = _status("VmHWM")
        found["resident_before"] = before
    else:
        yield found


def _status(name: str) -> int:
    """Return an entry of the process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on beside the model."""
    return {
        "device": str(device),
        "device_name": device_name(device),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "transformers": transformers.__version__,
        "tokenprune": tokenprune.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu() if device.type == "cpu" else device.type


def _cpu() -> str:
    """Return the name of the processor."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
