"""Predicts time and memory on a device from counted work, with the roofline model.

There are two bounds. **Fused**: a phase takes the longer of two times, its FLOPs at the peak rate and one read of all
tensors from before the phase; no real program is faster. **By kernel**: each kernel takes the longer of its FLOPs and
its bytes read and written. Unfused PyTorch would need this time if every kernel reached the peak without waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.experiments.bench.cost.count import BatchCost
from tokenprune.experiments.bench.cost.devices import Device
from tokenprune.experiments.bench.cost.meter import Work


@dataclass(frozen=True)
class Bounds:
    """A quantity under both bounds.

    Args:
        fused: the quantity if each phase were one ideal kernel.
        by_kernel: the quantity if each kernel were ideal.
    """

    fused: float
    by_kernel: float

    def __add__(self, bounds: Bounds) -> Bounds:
        return Bounds(self.fused + bounds.fused, self.by_kernel + bounds.by_kernel)


@dataclass(frozen=True)
class Prediction:
    """Predicted time and memory of a batch on a device.

    Args:
        device: the device.
        arithmetic: data type of the arithmetic.
        encode: seconds to encode the images.
        prefill: seconds of the prefill.
        decode: seconds of one further token.
        tokens_per_second: new tokens of all prompts divided by the total time, including encode and prefill.
        peak_bytes: peak memory.
    """

    device: Device
    arithmetic: str
    encode: Bounds
    prefill: Bounds
    decode: Bounds
    tokens_per_second: Bounds
    peak_bytes: int

    @property
    def ttft(self) -> Bounds:
        """Seconds to the first token, without the preparation of the inputs on the CPU."""
        return self.encode + self.prefill

    @property
    def fits(self) -> bool:
        """Whether the memory of the device is enough."""
        return self.peak_bytes <= self.device.memory


def predict_seconds(work: Work, rate: float, bandwidth: float) -> Bounds:
    """Return the time of a phase in seconds.

    Args:
        work: the counted work of the phase.
        rate: FLOP/s of the device.
        bandwidth: memory bandwidth in bytes per second.
    """
    by_kernel = sum(count * max(flops / rate, moved / bandwidth) for (flops, moved), count in work.kernels.items())
    return Bounds(max(work.flops / rate, work.read_once / bandwidth), by_kernel)


def predict(
    cost: BatchCost,
    device: Device,
    new_tokens: int,
    dtype: str = "float16",
    efficiency: float = 1.0,
    native: bool = False,
) -> Prediction:
    """Return the predicted time and memory of a batch on a device.

    Args:
        cost: the counted cost of the batch.
        device: the device.
        new_tokens: new tokens of each prompt.
        dtype: data type of weights and activations.
        efficiency: reached share of peak arithmetic and peak bandwidth; 1.0 is the roofline itself.
        native: whether to use the rate of the type itself, even if torch uses another type.

    Raises:
        ValueError: if the efficiency is not in (0, 1], if ``new_tokens`` is below 1, or if the device has no rate for
            the type.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency {efficiency} is no share of the peak; give a number above 0 and up to 1")
    if new_tokens < 1:
        raise ValueError(f"new_tokens is {new_tokens}; give at least one")
    rate, arithmetic = device.peak_rate(dtype, native)
    encode, prefill, decode = (
        predict_seconds(work, rate * efficiency, device.bandwidth * efficiency)
        for work in (cost.encode, cost.prefill, cost.decode)
    )
    total_tokens, steps = cost.batch * new_tokens, new_tokens - 1
    throughput = Bounds(
        *(
            total_tokens / (getattr(encode, bound) + getattr(prefill, bound) + steps * getattr(decode, bound))
            for bound in ("fused", "by_kernel")
        )
    )
    return Prediction(device, arithmetic, encode, prefill, decode, throughput, cost.peak_bytes(new_tokens))
