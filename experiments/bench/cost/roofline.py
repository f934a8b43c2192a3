"""The roofline: from counted work to time and memory on a device.

Two bounds. **Fused**: a phase takes the longer of its FLOPs at the peak rate and of reading once whatever it finds in
memory; no real program is faster. **By kernel**: each kernel by itself takes the longer of its FLOPs and of its bytes
read and written; this is what unfused PyTorch would take if every kernel reached the peak and nothing waited.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.experiments.bench.cost.count import Counted
from tokenprune.experiments.bench.cost.devices import Device
from tokenprune.experiments.bench.cost.meter import Work


@dataclass(frozen=True)
class Bounds:
    """A quantity under both bounds.

    Args:
        fused: if a phase were one perfect kernel.
        by_kernel: if every kernel were perfect by itself.
    """

    fused: float
    by_kernel: float

    def __add__(self, other: Bounds) -> Bounds:
        return Bounds(self.fused + other.fused, self.by_kernel + other.by_kernel)


@dataclass(frozen=True)
class Prediction:
    """What a batch takes on a device.

    Args:
        device: the device.
        arithmetic: the type whose rate was taken.
        encode: seconds to encode the images.
        prefill: seconds of the prompt.
        decode: seconds of one more token.
        tokens_per_second: new tokens of all prompts over the whole time, encode and prefill included.
        peak_bytes: most memory needed at once.
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
        """Seconds to the first token, without making the inputs on the CPU."""
        return self.encode + self.prefill

    @property
    def fits(self) -> bool:
        """Whether the memory of the device is enough."""
        return self.peak_bytes <= self.device.memory


def seconds(work: Work, flops: float, bandwidth: float) -> Bounds:
    """Return the time of a phase.

    Args:
        work: what it does.
        flops: FLOP/s.
        bandwidth: bytes a second.
    """
    by_kernel = sum(number * max(one / flops, moved / bandwidth) for (one, moved), number in work.kernels.items())
    return Bounds(max(work.flops / flops, work.read_once / bandwidth), by_kernel)


def predict(
    counted: Counted,
    device: Device,
    new_tokens: int,
    dtype: str = "float16",
    efficiency: float = 1.0,
    native: bool = False,
) -> Prediction:
    """Return what a batch takes on a device.

    Args:
        counted: the batch.
        device: the device.
        new_tokens: tokens of an answer.
        dtype: what weights and activations are stored in.
        efficiency: share of peak arithmetic and bandwidth that is reached; 1.0 is the roofline itself.
        native: the rate of the type itself, even where torch takes another one.

    Raises:
        ValueError: if the efficiency is no share, there is no new token, or the device does not know the type.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency {efficiency} is no share of the peak; give a number above 0 and up to 1")
    if new_tokens < 1:
        raise ValueError(f"an answer has at least one token, not {new_tokens}")
    rate, arithmetic = device.rate(dtype, native)
    encode, prefill, decode = (
        seconds(work, rate * efficiency, device.bandwidth * efficiency)
        for work in (counted.encode, counted.prefill, counted.decode)
    )
    made, steps = counted.batch * new_tokens, new_tokens - 1
    speed = Bounds(
        *(
            made / (getattr(encode, bound) + getattr(prefill, bound) + steps * getattr(decode, bound))
            for bound in ("fused", "by_kernel")
        )
    )
    return Prediction(device, arithmetic, encode, prefill, decode, speed, counted.peak_bytes(new_tokens))
