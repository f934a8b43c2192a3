"""Measures variants of a `generate` call in turns: the plain transformers model, and reducers at several budgets.

Each variant runs once for its FLOPs and once for its memory, then in untimed rounds, then in timed rounds. A round runs
every variant once, and the order changes from round to round, so that a temporary slowdown of the machine affects all
variants alike. Ratios compare variants within the same round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tokenprune.attach import Attachment
from tokenprune.experiments.bench.bench_model import BenchModel, Size, random_image
from tokenprune.experiments.bench.cost.meter import Meter
from tokenprune.experiments.bench.environment import peak_memory, wait_for
from tokenprune.experiments.bench.flop_counter import create_flop_counter
from tokenprune.experiments.bench.phase_timer import (
    DECODE,
    ENCODE_PHASES,
    FIRST_TOKEN_PHASES,
    PREPROCESS,
    PhaseTimer,
    instrument,
)
from tokenprune.pipeline import call_generate
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run

T = TypeVar("T")
PLAIN = "plain"
"""Name of the variant without a reducer."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Args:
        name: name in tables.
        reducer: the attached strategy; None for the unmodified model.
    """

    name: str
    reducer: TokenReducer | None = None


@dataclass(frozen=True)
class Workload:
    """Inputs that all variants process.

    Args:
        batch: number of prompts, with one image each.
        size: height x width of the images in pixels.
    """

    batch: int
    size: Size

    def __str__(self) -> str:
        """Return the batch and the image size as text."""
        return f"batch {self.batch}, {self.size[0]} x {self.size[1]} pixels"


@dataclass(frozen=True)
class BenchProtocol:
    """Length and number of the measured calls.

    Args:
        tokens: exact number of new tokens of each prompt.
        repeats: timed rounds.
        warmup: untimed rounds before them, in addition to the calls for FLOPs and memory.
    """

    tokens: int = 16
    repeats: int = 7
    warmup: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if a number is too small; the error names the option.
        """
        for name, minimum in (("tokens", 2), ("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name} {getattr(self, name)}: give at least {minimum}")


@dataclass
class Measurement:
    """Measurements of one variant on one workload. Times are in seconds.

    Args:
        variant: the variant.
        call_seconds: time of the complete call, per round.
        first_token_seconds: time to the first token, per round.
        phases: time of each phase, per round.
        flops: FLOPs of each phase.
        operators: FLOPs of each torch operator.
        kv_bytes: bytes of the key-value cache after prefill.
        memory: bytes at the peak; see `peak_memory`.
        prompt: length in tokens of the longest prompt that enters the LLM.
        visual: visual tokens in all prompts; for the plain model, newline tokens are included.
        error: the reason for missing measurements; None if they are present.
    """

    variant: Variant
    call_seconds: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    kv_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    prompt: int = 0
    visual: int = 0
    error: str | None = None

    def series(self, workload: Workload, tokens: int) -> dict[str, list[float]]:
        """Return the compared quantities by name, per round. Lower is better for all of them."""
        encode = self.sum_seconds(ENCODE_PHASES)
        encode_prefill = [a + b for a, b in zip(encode, self.sum_seconds(["prefill"]), strict=True)]
        durations = zip(self.call_seconds, self.first_token_seconds, strict=True)
        decode_step = [(total - first_token) / (tokens - 1) for total, first_token in durations]
        return {
            "encode_ms": [1e3 * seconds for seconds in encode],
            "encode_prefill_ms": [1e3 * seconds for seconds in encode_prefill],
            "ttft_ms": [1e3 * seconds for seconds in self.first_token_seconds],
            "decode_ms_per_token": [1e3 * seconds for seconds in decode_step],
            "ms_per_new_token": [1e3 * seconds / (workload.batch * tokens) for seconds in self.call_seconds],
        }

    def sum_seconds(self, phases: Sequence[str]) -> list[float]:
        """Return the total time of some phases, per round."""
        return [sum(self.phases[phase][index] for phase in phases) for index in range(len(self.call_seconds))]

    def sum_flops(self, phases: Sequence[str]) -> int:
        """Return the total FLOPs of some phases."""
        return sum(self.flops.get(phase, 0) for phase in phases)


def round_order(variants: Sequence[T], round_number: int) -> list[T]:
    """Return the variants in the order of a round.

    Odd rounds reverse the order, and every second round starts with the next variant. Over the rounds, each variant
    comes first about equally often, and before and after each other variant about equally often.

    Args:
        variants: the variants.
        round_number: the round, from 0.
    """
    start = round_number // 2 % len(variants)
    order = [*variants[start:], *variants[:start]]
    return order[::-1] if round_number % 2 else order


class _TokenTimes(BaseStreamer):
    """Records the time of each new token: `generate` passes a token on after the device has computed it."""

    def __init__(self, clock: Callable[[], float], timer: PhaseTimer | None) -> None:
        self.clock, self.timer = clock, timer
        self.times: list[float] = []
        self.expects_prompt = True

    def put(self, value: Tensor) -> None:
        """Record the time, except for the prompt, which `generate` passes first."""
        if not self.expects_prompt:
            self.times.append(self.clock())
            if len(self.times) == 1 and self.timer is not None:
                self.timer.start_decoding()
        self.expects_prompt = False

    def end(self) -> None:
        """Do nothing; the base class requires this method."""


def generate_once(
    bench_model: BenchModel,
    inputs: Mapping[str, Any],
    variant: Variant,
    tokens: int,
    clock: Callable[[], float] = perf_counter,
    create_timer: Callable[[], PhaseTimer] | None = None,
    context: AbstractContextManager[Any] | None = None,
    on_forward: Callable[[Any], None] | None = None,
) -> tuple[float, float, PhaseTimer | None, Run | None]:
    """Generate with a variant once, and return the time of the call and the time to its first token.

    Args:
        bench_model: the model.
        inputs: its inputs.
        variant: the variant.
        tokens: number of new tokens.
        clock: returns the current time.
        create_timer: creates the phase timer of the call at its start; None leaves the model unwrapped and measures no
            phases.
        context: entered directly around `generate`.
        on_forward: receives the output of each forward pass; requires ``create_timer``.

    Returns:
        Time of the call, time to the first token, the phase timer (None without ``create_timer``), and the run of the
        reducer (None for the unmodified model).
    """
    device, timer = bench_model.model.device, None
    reducer, pipeline, run = variant.reducer, None, None
    with torch.inference_mode(), ExitStack() as stack:
        if reducer is not None:
            attachment = Attachment(bench_model.model, reducer, tokenizer=bench_model.processor, keep_pixels=False)
            run, pipeline = stack.enter_context(attachment), attachment.pipeline
        stack.enter_context(context or nullcontext())
        wait_for(device)
        timer = create_timer() if create_timer is not None else None
        adapter = bench_model.adapter if pipeline is None else pipeline.adapter
        with instrument(adapter, timer, pipeline, on_forward) if timer is not None else nullcontext():
            if timer is not None:
                timer.start()
            start = clock()
            streamer = _TokenTimes(clock, timer)
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            call_generate(bench_model.model, inputs, **lengths, do_sample=False, streamer=streamer)
            wait_for(device)
            end = clock()
            if timer is not None:
                timer.flush()
    return end - start, streamer.times[0] - start, timer, run


def count_work(bench_model: BenchModel, inputs: Mapping[str, Any], measurement: Measurement) -> None:
    """Store the quantities that need no clock: FLOPs of each phase, bytes of the cache and tensors, and token counts.

    Args:
        bench_model: the model.
        inputs: its inputs.
        measurement: names the variant and receives the results.
    """
    tokens, counter = 2, create_flop_counter()  # all decoding steps do the same work

    def store_cache_size(out: Any) -> None:
        if not measurement.kv_bytes:
            measurement.kv_bytes = cache_bytes(out.past_key_values)

    def create_timer() -> PhaseTimer:
        return PhaseTimer(counter.get_total_flops)

    meter = Meter(bench_model.model.device.type)
    with meter.phase() as work:  # bytes alive at once; CUDA reports them, the resident memory of a CPU process does not
        _, _, timer, run = generate_once(
            bench_model,
            inputs,
            measurement.variant,
            tokens,
            create_timer=create_timer,
            context=counter,
            on_forward=store_cache_size,
        )
    assert timer is not None
    measurement.memory["tensors"] = work.peak_bytes
    measurement.flops = {phase: int(flops) for phase, flops in timer.spent.items()}
    measurement.operators = {str(name): int(flops) for name, flops in counter.get_flop_counts()["Global"].items()}
    if run is None:
        measurement.prompt = inputs["input_ids"].shape[1]
        measurement.visual = int(bench_model.adapter.placeholders(inputs).sum())
    else:
        measurement.prompt = max(reduced for _, reduced in run.account.prompt_lengths)
        measurement.visual = sum(image.kept + image.newlines for image in run.account.images)


def measure_memory(bench_model: BenchModel, inputs: Mapping[str, Any], measurement: Measurement, tokens: int) -> None:
    """Store the peak memory of a call without instrumentation."""
    with peak_memory(bench_model.model.device) as peak:
        generate_once(bench_model, inputs, measurement.variant, tokens)
    measurement.memory |= peak


def cache_bytes(cache: Any) -> int:
    """Return the bytes of keys and values in a cache."""
    values = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def measure_variants(
    bench_model: BenchModel,
    workload: Workload,
    variants: Sequence[Variant],
    protocol: BenchProtocol,
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Measure variants in turns on the same inputs.

    Args:
        bench_model: the model.
        workload: the inputs.
        variants: the ways to run the model.
        protocol: length and number of the calls.
        on_progress: receives a text at the start of each step.

    Returns:
        One measurement per variant. If memory does not suffice for a variant, its measurement has an error, and the
        remaining variants continue.
    """
    images = [random_image(workload.size, seed) for seed in range(workload.batch)]
    inputs = bench_model.prepare(images)
    measurements = {variant.name: Measurement(variant) for variant in variants}
    device = bench_model.model.device

    def attempt(step: Callable[..., None], measurement: Measurement, *args: Any) -> None:
        if measurement.error is not None:
            return
        try:
            step(bench_model, inputs, measurement, *args)
        except torch.OutOfMemoryError:
            measurement.error = "out of memory"
            measurement.call_seconds, measurement.first_token_seconds, measurement.phases = [], [], {}

    for measurement in measurements.values():
        on_progress(f"{workload}: FLOPs and memory of {measurement.variant.name}")
        attempt(count_work, measurement)
        attempt(measure_memory, measurement, protocol.tokens)

    for number in range(-protocol.warmup, protocol.repeats):
        progress = f"round {number + 1} of {protocol.repeats}" if number >= 0 else "warming up"
        on_progress(f"{workload}: {progress}")
        wait_for(device)
        start = perf_counter()
        inputs = bench_model.prepare(images)
        wait_for(device)
        preprocess_seconds = perf_counter() - start
        for measurement in round_order(list(measurements.values()), max(0, number)):
            attempt(time_variant, measurement, protocol.tokens, preprocess_seconds, number >= 0)
    return list(measurements.values())


def time_variant(
    bench_model: BenchModel,
    inputs: Mapping[str, Any],
    measurement: Measurement,
    tokens: int,
    preprocess_seconds: float,
    is_timed: bool,
) -> None:
    """Time a variant once, and append the times to its measurement.

    On a CPU, reading the clock at phase borders costs almost nothing. On other devices each reading waits for the
    device, which an ordinary call does not do. There, a second call measures the phases.

    Args:
        bench_model: the model.
        inputs: its inputs.
        measurement: names the variant and receives the times.
        tokens: number of new tokens.
        preprocess_seconds: time spent on preparing the inputs.
        is_timed: whether to store the times; False in untimed rounds.
    """
    device = bench_model.model.device

    def read_clock() -> float:
        wait_for(device)
        return perf_counter()

    def create_timer() -> PhaseTimer:
        return PhaseTimer(read_clock)

    variant = measurement.variant
    if device.type == "cpu":
        total, first_token, timer, _ = generate_once(bench_model, inputs, variant, tokens, create_timer=create_timer)
    else:
        total, first_token, _, _ = generate_once(bench_model, inputs, variant, tokens)
        _, _, timer, _ = generate_once(bench_model, inputs, variant, tokens, create_timer=create_timer)
    if not is_timed or timer is None:
        return
    measurement.call_seconds.append(total)
    measurement.first_token_seconds.append(first_token)
    for phase in (*FIRST_TOKEN_PHASES, DECODE):
        measurement.phases.setdefault(phase, []).append(timer.spent.get(phase, 0.0))
    measurement.phases.setdefault(PREPROCESS, []).append(preprocess_seconds)


def with_plain_variant(reducers: Sequence[tuple[str, TokenReducer]]) -> list[Variant]:
    """Return the variants of named reducers, after the plain model."""
    return [Variant(PLAIN), *(Variant(name, reducer) for name, reducer in reducers)]
