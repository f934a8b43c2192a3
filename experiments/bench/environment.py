"""Waits for devices, measures peak memory, and describes the machine for results."""

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
    """Wait until a device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Measure the peak memory of the block, after emptying the caches.

    Args:
        device: device of the model.

    Yields:
        A dictionary that is filled at the end of the block. CUDA: bytes ``allocated`` and ``reserved`` at the peak, and
        ``allocated_before``. CPU on Linux: bytes ``resident`` at the peak, and ``resident_before``. Other systems:
        empty.
    """
    peak: dict[str, int] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak["allocated"] = torch.cuda.max_memory_allocated(device)
        peak["reserved"] = torch.cuda.max_memory_reserved(device)
        peak["allocated_before"] = before
    elif device.type == "cpu" and Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # returns memory that earlier calls freed to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident memory
        before = _read_status("VmRSS")
        yield peak
        peak["resident"] = _read_status("VmHWM")
        peak["resident_before"] = before
    else:
        yield peak


def _read_status(name: str) -> int:
    """Return an entry of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return the machine and the versions of the software as plain data."""
    return {
        "device": str(device),
        "device_name": read_device_name(device),
        "cpu": _read_cpu_name(),
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


def read_device_name(device: torch.device) -> str:
    """Return the product name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _read_cpu_name() if device.type == "cpu" else device.type


def _read_cpu_name() -> str:
    """Return the name of the processor."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
