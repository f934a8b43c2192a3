"""Measures variants of a `generate` call in turns: the plain transformers model, a baseline, and reducers.

Each variant runs once for its counts and once for its memory, then in untimed rounds, then in timed rounds. A round
runs every variant once, and the order changes from round to round, so that a temporary slowdown of the machine affects
all variants alike. Ratios compare variants within the same round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tokenprune.adapter import find_adapter
from tokenprune.attach import Attachment
from tokenprune.budget import Budget, as_budget
from tokenprune.caches import find_cache
from tokenprune.compiled import COMPILED_WIDTH, CompileOptions
from tokenprune.display import format_count
from tokenprune.experiments.bench.bench_model import BenchModel, Size, random_image
from tokenprune.experiments.bench.cost.meter import Meter
from tokenprune.experiments.bench.environment import peak_memory, wait_for
from tokenprune.experiments.bench.flop_counter import create_flop_counter
from tokenprune.experiments.bench.launches import OPERATORS, LaunchRecorder, OperatorCounter
from tokenprune.experiments.bench.phase_timer import (
    DECODE,
    ENCODE_PHASES,
    FIRST_TOKEN_PHASES,
    PREPROCESS,
    PhaseTimer,
    instrument,
)
from tokenprune.experiments.bench.release_like import as_supported, build_inputs_embeds, eager_attention
from tokenprune.pipeline import Pipeline, call_generate
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run

T = TypeVar("T")
PLAIN = "plain"
"""Name of the variant of the unmodified model."""
RELEASE_LIKE = "release-like"
"""Start of the names of the variants of the baseline."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Args:
        name: name in tables.
        reducer: the attached strategy; None for the unmodified model and the baseline.
        release_budget: tokens of each image that the release-like baseline keeps (`release_like.py`): a share as a
            float, or a number as an int; None otherwise.
        reference: name of the release-like variant with the same budget, to which this variant is compared.
        is_compiled: whether tower, strategy and LLM run as compiled graphs. FLOPs and operators are then not counted,
            because the counters do not see inside graphs.
    """

    name: str
    reducer: TokenReducer | None = None
    release_budget: int | float | None = None
    reference: str | None = None
    is_compiled: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the unmodified model runs."""
        return self.reducer is None and self.release_budget is None


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
        flops: FLOPs of each phase; None if not counted.
        operators: FLOPs of each torch operator; None if not counted.
        launches: kernel launches and waits, or dispatched operators, of the call up to its first token; None if not
            counted.
        kv_bytes: bytes of the key-value cache after prefill.
        memory: bytes at the peak; see `peak_memory`. If counted, ``"tensors"`` are the bytes alive at once.
        prompt: length in tokens of the longest prompt that enters the LLM.
        visual: visual tokens in all prompts, including newline tokens.
        tower_patches_share: patches in the layers of the vision tower as a share of the patches without reduction; None
            if no strategy dropped or merged patches.
        error: the reason for missing measurements; None if they are present.
    """

    variant: Variant
    call_seconds: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    flops: dict[str, int] | None = None
    operators: dict[str, int] | None = None
    launches: dict[str, int] | None = None
    kv_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    prompt: int = 0
    visual: int = 0
    tower_patches_share: float | None = None
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

    def sum_flops(self, phases: Sequence[str]) -> int | None:
        """Return the total FLOPs of some phases, or None if they were not counted."""
        return None if self.flops is None else sum(self.flops.get(phase, 0) for phase in phases)


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
    builds_tables: bool = False,
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
        builds_tables: whether to reduce the images once before the call. The call then has the index tables of its
            layout on the device, as in a long run.

    Returns:
        Time of the call, time to the first token, the phase timer (None without ``create_timer``), and the run of the
        reducer (None for the unmodified model).
    """
    device, timer = bench_model.model.device, None
    reducer, budget, pipeline, run = variant.reducer, variant.release_budget, None, None
    with torch.inference_mode(), ExitStack() as stack:
        if reducer is not None and variant.is_compiled:
            pipeline = build_compiled_pipeline(bench_model, variant.name, reducer)
            run = pipeline.run
        elif reducer is not None:
            attachment = Attachment(bench_model.model, reducer, tokenizer=bench_model.processor, keep_pixels=False)
            run, pipeline = stack.enter_context(attachment), attachment.pipeline
        if builds_tables and pipeline is not None:
            pipeline.prepare(inputs, for_generate=True)
        adapter = bench_model.adapter if pipeline is None else pipeline.adapter
        if budget is not None:
            stack.enter_context(eager_attention(as_supported(adapter).tower))
        stack.enter_context(context or nullcontext())
        wait_for(device)
        timer = create_timer() if create_timer is not None else None
        with instrument(adapter, timer, pipeline, on_forward) if timer is not None else nullcontext():
            if timer is not None:
                timer.start()
            start = clock()
            streamer = _TokenTimes(clock, timer)
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            if budget is not None:
                phase = None if timer is None else timer.phase
                inputs = build_inputs_embeds(as_supported(adapter), inputs, budget, phase)
            options = {**lengths, "do_sample": False, "streamer": streamer}
            if variant.is_compiled and pipeline is not None:
                pipeline.generate({**inputs, **options})
            else:
                call_generate(bench_model.model, inputs, **options)
            wait_for(device)
            end = clock()
            if timer is not None:
                timer.flush()
    return end - start, streamer.times[0] - start, timer, run


def build_compiled_pipeline(bench_model: BenchModel, name: str, reducer: TokenReducer) -> Pipeline:
    """Return the pipeline of a compiled variant; later calls return the same pipeline with its graphs.

    Args:
        bench_model: the model.
        name: name of the variant.
        reducer: its strategy.
    """
    if name not in bench_model.pipelines:
        bench_model.pipelines[name] = Pipeline(
            reducer,
            find_adapter(bench_model.model),
            tokenizer=bench_model.processor,
            keep_pixels=False,
            compile_options=CompileOptions(),
            pad_to_multiple_of=COMPILED_WIDTH,
        )
    return bench_model.pipelines[name]


def count_tokens(
    bench_model: BenchModel,
    inputs: Mapping[str, Any],
    measurement: Measurement,
    create_timer: Callable[[], PhaseTimer] = lambda: PhaseTimer(perf_counter),
    context: AbstractContextManager[Any] | None = None,
    on_prefill: Callable[[], None] = lambda: None,
) -> PhaseTimer:
    """Store the lengths of the prompts and the bytes of the cache, and return the phase timer of the call.

    Args:
        bench_model: the model.
        inputs: its inputs; all prompts have equal lengths.
        measurement: names the variant and receives the results.
        create_timer: creates the phase timer of the call.
        context: entered directly around `generate`.
        on_prefill: called after the first forward pass.
    """

    def store_cache_size(out: Any) -> None:
        if not measurement.kv_bytes:
            cache = find_cache(out)
            measurement.kv_bytes = cache_bytes(cache)
            measurement.prompt = int(cache.get_seq_length())
            on_prefill()

    _, _, timer, run = generate_once(
        bench_model,
        inputs,
        measurement.variant,
        2,  # all decoding steps do the same work
        create_timer=create_timer,
        context=context,
        on_forward=store_cache_size,
        builds_tables=True,
    )
    assert timer is not None
    rows, length = inputs["input_ids"].shape
    measurement.visual = int(bench_model.adapter.placeholders(inputs).sum()) - rows * (length - measurement.prompt)
    if run is not None:
        measurement.prompt = max(reduced for _, reduced in run.account.prompt_lengths)
        if full := run.account.tower_patches_full:
            measurement.tower_patches_share = run.account.tower_patches / full
        measurement.visual = sum(image.kept + image.newlines for image in run.account.images[-rows:])
    return timer


def count_work(bench_model: BenchModel, inputs: Mapping[str, Any], measurement: Measurement) -> None:
    """Store the quantities that need no clock: FLOPs of each phase, live bytes, launches, and token counts.

    Args:
        bench_model: the model.
        inputs: its inputs.
        measurement: names the variant and receives the results.
    """
    device, counter, dispatched = bench_model.model.device, create_flop_counter(), OperatorCounter()

    meter = Meter(device.type)

    @contextmanager
    def count() -> Iterator[None]:
        # CUDA reports bytes alive at once, the resident memory of a CPU process does not; the meter counts them. The
        # outermost mode sees the operators that the FLOP counter has divided into kernels.
        with dispatched, meter.phase() as work, counter:
            yield
        measurement.memory["tensors"] = work.peak_bytes

    def create_timer() -> PhaseTimer:
        return PhaseTimer(counter.get_total_flops)

    def store_operators() -> None:
        measurement.launches = {OPERATORS: dispatched.number}

    timer = count_tokens(bench_model, inputs, measurement, create_timer, count(), store_operators)
    measurement.flops = {phase: int(flops) for phase, flops in timer.spent.items()}
    measurement.operators = {str(name): int(flops) for name, flops in counter.get_flop_counts()["Global"].items()}
    if device.type == "cuda":
        count_launches(bench_model, inputs, measurement)


def count_launches(bench_model: BenchModel, inputs: Mapping[str, Any], measurement: Measurement) -> None:
    """Store the kernel launches and waits of a call up to its first token, on CUDA."""
    recorder = LaunchRecorder()
    generate_once(bench_model, inputs, measurement.variant, 1, context=recorder, builds_tables=True)
    measurement.launches = recorder.counts


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
    count: bool = True,
) -> list[Measurement]:
    """Measure variants in turns on the same inputs.

    Args:
        bench_model: the model.
        workload: the inputs.
        variants: the ways to run the model.
        protocol: length and number of the calls.
        on_progress: receives a text at the start of each step.
        count: whether to count FLOPs, live tensors and launches (`count_work`), or only tokens.

    Returns:
        One measurement per variant. If memory does not suffice for a variant, its measurement has an error, and the
        remaining variants continue.
    """
    images = [random_image(workload.size, seed) for seed in range(workload.batch)]
    inputs = bench_model.prepare(images)
    measurements = {variant.name: Measurement(variant) for variant in variants}
    device = bench_model.model.device
    bench_model.pipelines.clear()  # frees the graphs of earlier workloads

    def attempt(step: Callable[..., object], measurement: Measurement, *args: Any) -> None:
        if measurement.error is not None:
            return
        try:
            step(bench_model, inputs, measurement, *args)
        except torch.OutOfMemoryError:
            measurement.error = "out of memory"
            measurement.call_seconds, measurement.first_token_seconds, measurement.phases = [], [], {}

    for measurement in measurements.values():
        counts_work = count and not measurement.variant.is_compiled
        on_progress(f"{workload}: {'counts' if counts_work else 'tokens'} and memory of {measurement.variant.name}")
        attempt(count_work if counts_work else count_tokens, measurement)
        if count and not counts_work and device.type == "cuda":
            attempt(count_launches, measurement)
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


def time_phases(
    bench_model: BenchModel, inputs: Mapping[str, Any], variant: Variant, tokens: int, times_apart: bool
) -> tuple[float, float, dict[str, float]]:
    """Return the time of a call, the time to its first token, and the time of each phase, in seconds.

    On a CPU, reading the clock at phase borders costs almost nothing. On other devices each reading waits for the
    device, which an ordinary call does not do. There, a second call of two new tokens measures the phases up to the
    first token, and decoding is the remaining time of the first call.

    Args:
        bench_model: the model.
        inputs: its inputs.
        variant: the way to run the model.
        tokens: number of new tokens.
        times_apart: whether a second call measures the phases. Both calls then find the tables of the layout.
    """

    def read_clock() -> float:
        wait_for(bench_model.model.device)
        return perf_counter()

    def create_timer() -> PhaseTimer:
        return PhaseTimer(read_clock)

    if times_apart:
        total, first_token, _, _ = generate_once(bench_model, inputs, variant, tokens, builds_tables=True)
        _, _, timer, _ = generate_once(bench_model, inputs, variant, 2, create_timer=create_timer, builds_tables=True)
        assert timer is not None
        return total, first_token, timer.spent | {DECODE: total - first_token}
    total, first_token, timer, _ = generate_once(bench_model, inputs, variant, tokens, create_timer=create_timer)
    assert timer is not None
    return total, first_token, timer.spent


def time_variant(
    bench_model: BenchModel,
    inputs: Mapping[str, Any],
    measurement: Measurement,
    tokens: int,
    preprocess_seconds: float,
    is_timed: bool,
) -> None:
    """Time a variant once, and append the times to its measurement.

    Args:
        bench_model: the model.
        inputs: its inputs.
        measurement: names the variant and receives the times.
        tokens: number of new tokens.
        preprocess_seconds: time spent on preparing the inputs.
        is_timed: whether to store the times; False in untimed rounds.
    """
    times_apart = bench_model.model.device.type != "cpu"
    total, first_token, phases = time_phases(bench_model, inputs, measurement.variant, tokens, times_apart)
    if not is_timed:
        return
    measurement.call_seconds.append(total)
    measurement.first_token_seconds.append(first_token)
    for phase in (*FIRST_TOKEN_PHASES, DECODE):
        measurement.phases.setdefault(phase, []).append(phases.get(phase, 0.0))
    measurement.phases.setdefault(PREPROCESS, []).append(preprocess_seconds)


def format_amount(amount: int | float) -> str:
    """Return a budget as text for tables: ``"20 %"``, ``"160 tokens"``.

    Args:
        amount: a share of the tokens as a float, or a number of tokens as an int.
    """
    return format_count(amount, "token") if isinstance(amount, int) else f"{100 * amount:g} %"


def keeps_all_tokens(amount: int | float) -> bool:
    """Return whether a budget is 100 %. The count 1, which equals 1.0 in Python, keeps one token."""
    return isinstance(amount, float) and amount == 1.0


def find_release_budget(reducer: TokenReducer) -> int | float | None:
    """Return the budget at which the release-like baseline is comparable to a strategy.

    Args:
        reducer: the strategy.

    Returns:
        A share of the encoded tokens as a float, or a number of tokens as an int. None if the strategy keeps all tokens
        or none, if its budget has other options (``per="tile"``, counted newline tokens, ...), which the baseline does
        not have, and if it is a composition or acts inside the tower or the LLM.
    """
    label = reducer.budget_label
    if isinstance(label, str):
        return None
    budget = as_budget(label)
    amount = budget.number
    return amount if budget == Budget(amount) and amount and not keeps_all_tokens(amount) else None


def list_variants(
    reducers: Sequence[tuple[str, TokenReducer]], release_budgets: Sequence[int | float] = (), compiled: bool = False
) -> list[Variant]:
    """Return the plain model, the release-like baseline at some budgets, and named reducers.

    Args:
        reducers: names and strategies.
        release_budgets: budgets of the baseline below 100 %: shares as floats, numbers of tokens as ints. A reducer
            with an equal budget is compared to it.
        compiled: whether each reducer before the LLM with a budget below 100 % is also measured with compiled graphs.
    """
    baselines = {
        budget: Variant(f"{RELEASE_LIKE} {format_amount(budget)}", release_budget=budget) for budget in release_budgets
    }
    variants = [Variant(PLAIN), *baselines.values()]
    for name, reducer in reducers:
        label, amount = reducer.budget_label, find_release_budget(reducer)
        baseline = None if amount is None else baselines.get(amount)
        variant = Variant(name, reducer, reference=None if baseline is None else baseline.name)
        variants.append(variant)
        if compiled and not isinstance(label, str) and not keeps_all_tokens(as_budget(label).number):
            variants.append(replace(variant, name=f"{name} compiled", is_compiled=True))
    return variants
