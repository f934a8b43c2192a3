"""Lists devices with the peak arithmetic, memory bandwidth and memory size of their datasheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenprune.registry import unknown_name_error

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peak rates and memory of one device.

    Args:
        name: name in tables.
        flops: peak FLOP/s of dense matrix products by data type of the factors, with float32 sums as in torch.
        bandwidth: peak memory bandwidth in bytes per second.
        memory: memory size in bytes.
        source: source of the numbers.
        computes_as: data types whose products torch runs at the rate of another type on this device.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: int
    source: str
    computes_as: Mapping[str, str]

    def peak_rate(self, dtype: str, native: bool = False) -> tuple[float, str]:
        """Return the peak FLOP/s for tensors of a data type, and the data type of the arithmetic.

        Args:
            dtype: data type of the tensors.
            native: whether to return the rate of the type itself, even if torch uses another type.

        Raises:
            ValueError: if the device has no rate for the type.
        """
        arithmetic = dtype if native else self.computes_as.get(dtype, dtype)
        if arithmetic not in self.flops:
            raise ValueError(
                f"{self.name} has no {arithmetic} arithmetic; its data types are {', '.join(sorted(self.flops))}"
            )
        return self.flops[arithmetic], arithmetic


_AMPERE = {"float32": 19.5e12, "float16": 312e12, "bfloat16": 312e12}
_HOPPER = {"float32": 67e12, "float16": 989.4e12, "bfloat16": 989.4e12}

DEVICES: Mapping[str, Device] = {
    "p40": Device(
        "Tesla P40",
        {"float32": 11.76e12, "float16": 11.76e12 / 64},
        346e9,
        24 * GIB,
        "NVIDIA Tesla P40 datasheet: 12 TFLOPS single precision (3,840 cores x 2 x 1.531 GHz), 346 GB/s, 24 GB. "
        "float16: 1/64 of float32 on compute capability 6.1 (CUDA C++ Programming Guide, arithmetic throughput)",
        {"float16": "float32", "bfloat16": "float32"},
    ),
    "t4": Device(
        "T4",
        {"float32": 8.1e12, "float16": 65e12},
        300e9,
        16 * GIB,
        "NVIDIA T4 datasheet: 8.1 TFLOPS float32, 65 TFLOPS float16 tensor cores, 300 GB/s, 16 GB; no bfloat16",
        {"bfloat16": "float32"},
    ),
    "a800": Device(
        "A800 80GB SXM",
        _AMPERE,
        2039e9,
        80 * GIB,
        "NVIDIA A800 datasheet: an A100 80GB with slower NVLink; arithmetic and memory are the same",
        {},
    ),
    "a100": Device(
        "A100 80GB SXM",
        _AMPERE,
        2039e9,
        80 * GIB,
        "NVIDIA A100 datasheet: 19.5 TFLOPS float32, 312 TFLOPS float16 and bfloat16 tensor cores (dense), 2,039 GB/s",
        {},
    ),
    "h100": Device(
        "H100 80GB SXM",
        _HOPPER,
        3350e9,
        80 * GIB,
        "NVIDIA H100 datasheet: 67 TFLOPS float32, 1,979 TFLOPS float16 and bfloat16 with sparsity, half of it dense, "
        "3.35 TB/s",
        {},
    ),
    "h200": Device(
        "H200 141GB SXM",
        _HOPPER,
        4800e9,
        141 * 10**9,
        "NVIDIA H200 datasheet: arithmetic as H100, 4.8 TB/s, 141 GB",
        {},
    ),
    "rtx4090": Device(
        "RTX 4090",
        {"float32": 82.6e12, "float16": 165.2e12, "bfloat16": 165.2e12},
        1008e9,
        24 * GIB,
        "NVIDIA Ada GPU architecture whitepaper: 82.6 TFLOPS float32, 165.2 TFLOPS float16 tensor cores with float32 "
        "sums (dense), 1,008 GB/s, 24 GB",
        {},
    ),
    "cpu": Device(
        "EPYC 7763 (64 cores)",
        {"float32": 5.02e12},
        204.8e9,
        4096 * GIB,
        "AMD EPYC 7763 product page: 64 cores, 2.45 GHz base, 204.8 GB/s, up to 4 TB; 32 float32 FLOPs a cycle and "
        "core (two 256-bit fused multiply-adds). No float16 or bfloat16 arithmetic",
        {"float16": "float32", "bfloat16": "float32"},
    ),
}


def find_device(name: str) -> Device:
    """Return a device of `DEVICES` by its name, without regard to case, spaces and hyphens.

    Raises:
        LookupError: if there is no such device; the error names the most similar names.
    """
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in DEVICES:
        raise unknown_name_error(name, [*DEVICES, "all"], "device", 0.5)
    return DEVICES[key]
