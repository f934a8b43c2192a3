"""Measures variants of a call in turns: plain transformers, and reducers at several budgets.

Every variant is called once for its FLOPs and once for its memory; then come untimed rounds, then the timed ones. In
each round all variants are called once, in another order, so that whatever slows the machine down for a while falls on
all of them. Ratios are taken inside a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.generation.streamers import BaseStreamer

from tokenprune.attach import Attachment
from tokenprune.configuration import as_config
from tokenprune.experiments.bench.bench_model import BenchModel, Size, image
from tokenprune.experiments.bench.cost.meter import Meter
from tokenprune.experiments.bench.environment import peak_memory, wait_for
from tokenprune.experiments.bench.phase_timer import BEFORE, DECODE, ENCODE, OWN, PREPROCESS, PhaseTimer, instrument
from tokenprune.experiments.bench.samples import Ratio, Samples
from tokenprune.pipeline import call_generate
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run

T = TypeVar("T")
PLAIN = "plain"
"""The unmodified model, nothing attached."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Args:
        name: what it is called in tables.
        reducer: the attached strategy; None for the unmodified model.
    """

    name: str
    reducer: TokenReducer | None = None


@dataclass(frozen=True)
class Workload:
    """Inputs that all variants are given.

    Args:
        batch: prompts, one image each.
        size: height x width of the images in pixels.
    """

    batch: int
    size: Size

    def __str__(self) -> str:
        """Return a line for people."""
        return f"batch {self.batch}, {self.size[0]} x {self.size[1]} pixels"


@dataclass(frozen=True)
class BenchProtocol:
    """How is measured.

    Args:
        tokens: new tokens of each prompt, never fewer.
        repeats: timed rounds.
        warmup: untimed rounds before, beside the calls for FLOPs and memory.
    """

    tokens: int = 16
    repeats: int = 7
    warmup: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: naming the option.
        """
        for name, least in (("tokens", 2), ("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: give at least {least}")


@dataclass
class Measurement:
    """What was found about one variant in one setting; times in seconds.

    Args:
        variant: the variant.
        whole: a whole call, per round.
        first: until the first token, per round.
        phases: what each phase took, per round.
        flops: FLOPs of each phase.
        operators: FLOPs of each torch operator.
        kv_bytes: bytes of the key-value cache after prefill.
        memory: bytes at the peak; see `peak_memory`.
        prompt: tokens of the longest prompt that the LLM was given.
        visual: visual tokens in all prompts, newlines included for the plain model.
        error: why there is nothing; None if there is.
    """

    variant: Variant
    whole: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    kv_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    prompt: int = 0
    visual: int = 0
    error: str | None = None

    def series(self, setting: Workload, tokens: int) -> dict[str, list[float]]:
        """Return what is compared, per round: less is better in all of it."""
        encode = self.together(ENCODE)
        prefill = [one + other for one, other in zip(encode, self.together(["prefill"]), strict=True)]
        decode = [(whole - first) / (tokens - 1) for whole, first in zip(self.whole, self.first, strict=True)]
        return {
            "encode_ms": [1e3 * one for one in encode],
            "encode_prefill_ms": [1e3 * one for one in prefill],
            "ttft_ms": [1e3 * one for one in self.first],
            "decode_ms_per_token": [1e3 * one for one in decode],
            "ms_per_new_token": [1e3 * one / (setting.batch * tokens) for one in self.whole],
        }

    def together(self, names: Sequence[str]) -> list[float]:
        """Return what some phases took together, per round."""
        return [sum(self.phases[name][number] for name in names) for number in range(len(self.whole))]

    def flops_of(self, names: Sequence[str]) -> int:
        """Return the FLOPs of some phases together."""
        return sum(self.flops.get(name, 0) for name in names)


def turns(variants: Sequence[T], round_number: int) -> list[T]:
    """Return the order of a round: every second one runs backwards, and every pair of rounds begins one further.

    So every variant comes first, and before and after every other one, about as often as any other.

    Args:
        variants: what takes turns.
        round_number: the round, from 0.
    """
    start = round_number // 2 % len(variants)
    order = [*variants[start:], *variants[:start]]
    return order[::-1] if round_number % 2 else order


class _Tokens(BaseStreamer):
    """Notes when tokens come: `generate` hands them over when the device has made them."""

    def __init__(self, clock: Callable[[], float], ledger: PhaseTimer | None) -> None:
        self.clock, self.ledger = clock, ledger
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: Tensor) -> None:
        """Note the time; the prompt comes first and does not count."""
        if not self.prompt:
            self.times.append(self.clock())
            if len(self.times) == 1 and self.ledger is not None:
                self.ledger.first_token()
        self.prompt = False

    def end(self) -> None:
        """Nothing is left to do."""


def call(
    subject: BenchModel,
    inputs: Mapping[str, Any],
    variant: Variant,
    tokens: int,
    clock: Callable[[], float] = perf_counter,
    ledger: Callable[[], PhaseTimer] | None = None,
    around: AbstractContextManager[Any] | None = None,
    forwarded: Callable[[Any], None] | None = None,
) -> tuple[float, float, PhaseTimer | None, Run | None]:
    """Let a variant answer once.

    Args:
        subject: the model.
        inputs: its inputs.
        variant: how to run it.
        tokens: new tokens.
        clock: tells the time.
        ledger: makes the ledger of the call when it begins; None measures no phases and touches nothing.
        around: entered just around `generate`.
        forwarded: is given the output of each forward pass; needs a ledger.

    Returns:
        Time of the call, time until its first token, the ledger, and the run of a reducer.
    """
    device, booked = subject.model.device, None
    reducer, pipeline, run = variant.reducer, None, None
    with torch.inference_mode(), ExitStack() as stack:
        if reducer is not None:
            attachment = Attachment(subject.model, reducer, tokenizer=subject.processor, keep_pixels=False)
            run, pipeline = stack.enter_context(attachment), attachment.pipeline
        stack.enter_context(around or nullcontext())
        wait_for(device)
        booked = ledger() if ledger is not None else None
        adapter = subject.adapter if pipeline is None else pipeline.adapter
        with instrument(adapter, booked, pipeline, forwarded) if booked is not None else nullcontext():
            if booked is not None:
                booked.start()
            began = clock()
            streamer = _Tokens(clock, booked)
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            call_generate(subject.model, inputs, **lengths, do_sample=False, streamer=streamer)
            wait_for(device)
            ended = clock()
            if booked is not None:
                booked.flush()
    return ended - began, streamer.times[0] - began, booked, run


ATEN = torch.ops.aten
SDPA_ON_CPU = ATEN._scaled_dot_product_flash_attention_for_cpu
FUSED_ATTENTION = {
    SDPA_ON_CPU: 4,
    ATEN._scaled_dot_product_flash_attention: 4,
    ATEN._scaled_dot_product_efficient_attention: 6,
    ATEN._scaled_dot_product_cudnn_attention: 6,
}
"""Torch's kernels of scaled dot product attention, and the place of ``is_causal`` among their arguments."""


def attention_flops(place: int, *args: Any, is_causal: bool = False, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of a fused attention kernel: of the full square, or under a causal flag of what is not masked.

    Told that attention is causal, these kernels skip the blocks above the diagonal (a mask that is given as a tensor
    skips nothing). Torch's own counter takes the full square always, and does not know the CPU's kernel.

    Args:
        place: the place of ``is_causal`` among the arguments.
        args: what the kernel was given, tensors as their shapes: queries, keys and values first.
        is_causal: the flag, where it was given by name.
        out_shape: shapes of what it returned; not used.
        kwargs: what else it was given by name; not used.
    """
    square = int(sdpa_flop_count(*args[:3]))
    if not (is_causal or (len(args) > place and args[place])):
        return square
    queries, keys = args[0][-2], args[1][-2]
    side = min(queries, keys)
    seen = side * (side + 1) // 2 + (queries - side) * keys
    return int(square * seen // (queries * keys))


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of FLOPs, corrected where attention is concerned (`attention_flops`)."""
    known = {kernel: partial(attention_flops, place) for kernel, place in FUSED_ATTENTION.items()}
    return FlopCounterMode(display=False, custom_mapping=known)


def count(subject: BenchModel, inputs: Mapping[str, Any], outcome: Measurement) -> None:
    """Fill in what needs no clock: FLOPs of each phase, the size of the cache, and the tokens."""
    tokens, counter = 2, flop_counter()  # all decoding steps are alike

    def forwarded(out: Any) -> None:
        if not outcome.kv_bytes:
            outcome.kv_bytes = cache_bytes(out.past_key_values)

    def ledger() -> PhaseTimer:
        return PhaseTimer(counter.get_total_flops)

    meter = Meter(subject.model.device.type)
    with meter.phase() as work:  # what is alive at once; CUDA tells it by itself, resident memory on a CPU does not
        _, _, booked, run = call(
            subject, inputs, outcome.variant, tokens, ledger=ledger, around=counter, forwarded=forwarded
        )
    assert booked is not None
    outcome.memory["tensors"] = work.peak_bytes
    outcome.flops = {name: int(spent) for name, spent in booked.spent.items()}
    outcome.operators = {str(name): int(spent) for name, spent in counter.get_flop_counts()["Global"].items()}
    if run is None:
        outcome.prompt = inputs["input_ids"].shape[1]
        outcome.visual = int(subject.adapter.placeholders(inputs).sum())
    else:
        outcome.prompt = max(after for _, after in run.account.prompt_lengths)
        outcome.visual = sum(image.kept + image.newlines for image in run.account.images)


def watch_memory(subject: BenchModel, inputs: Mapping[str, Any], outcome: Measurement, tokens: int) -> None:
    """Fill in the memory at the peak of an ordinary call."""
    with peak_memory(subject.model.device) as found:
        call(subject, inputs, outcome.variant, tokens)
    outcome.memory |= found


def cache_bytes(cache: Any) -> int:
    """Return the bytes of keys and values in a cache."""
    found = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(one.nbytes for one in found if isinstance(one, Tensor))


def measure(
    subject: BenchModel,
    setting: Workload,
    variants: Sequence[Variant],
    protocol: BenchProtocol,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Measure variants in turns, with the same inputs.

    Args:
        subject: the model.
        setting: the inputs.
        variants: the ways to run it.
        protocol: how is measured.
        tell: is told what is done.

    Returns:
        One outcome per variant. One for which memory did not suffice says so, and the others go on.
    """
    images = [image(setting.size, seed) for seed in range(setting.batch)]
    inputs = subject.prepare(images)
    outcomes = {variant.name: Measurement(variant) for variant in variants}
    device = subject.model.device

    def attempt(what: Callable[..., None], outcome: Measurement, *rest: Any) -> None:
        if outcome.error is not None:
            return
        try:
            what(subject, inputs, outcome, *rest)
        except torch.OutOfMemoryError:
            outcome.error = "out of memory"
            outcome.whole, outcome.first, outcome.phases = [], [], {}

    for outcome in outcomes.values():
        tell(f"{setting}: FLOPs and memory of {outcome.variant.name}")
        attempt(count, outcome)
        attempt(watch_memory, outcome, protocol.tokens)

    for number in range(-protocol.warmup, protocol.repeats):
        tell(f"{setting}: round {number + 1} of {protocol.repeats}" if number >= 0 else f"{setting}: warming up")
        wait_for(device)
        began = perf_counter()
        inputs = subject.prepare(images)
        wait_for(device)
        prepared = perf_counter() - began
        for outcome in turns(list(outcomes.values()), max(0, number)):
            attempt(time_once, outcome, protocol.tokens, prepared, number >= 0)
    return list(outcomes.values())


def time_once(
    subject: BenchModel, inputs: Mapping[str, Any], outcome: Measurement, tokens: int, prepared: float, keep: bool
) -> None:
    """Time a variant once.

    Reading the phases costs nothing on a CPU. On another device it means waiting at each border, which a call does not
    do by itself: there the phases come from a second call.

    Args:
        subject: the model.
        inputs: its inputs.
        outcome: where times go.
        tokens: new tokens.
        prepared: what making the inputs has taken.
        keep: whether the times count.
    """
    device = subject.model.device

    def now() -> float:
        wait_for(device)
        return perf_counter()

    def ledger() -> PhaseTimer:
        return PhaseTimer(now)

    if device.type == "cpu":
        whole, first, booked, _ = call(subject, inputs, outcome.variant, tokens, ledger=ledger)
    else:
        whole, first, _, _ = call(subject, inputs, outcome.variant, tokens)
        _, _, booked, _ = call(subject, inputs, outcome.variant, tokens, ledger=ledger)
    if not keep or booked is None:
        return
    outcome.whole.append(whole)
    outcome.first.append(first)
    for name in (*BEFORE, DECODE):
        outcome.phases.setdefault(name, []).append(booked.spent.get(name, 0.0))
    outcome.phases.setdefault(PREPROCESS, []).append(prepared)


def as_data(outcomes: Sequence[Measurement], setting: Workload, protocol: BenchProtocol) -> dict[str, Any]:
    """Return the outcomes of a setting as plain data, with ratios to the plain model.

    Args:
        outcomes: one per variant.
        setting: their inputs.
        protocol: how they were measured.
    """
    plain = next((one for one in outcomes if one.variant.reducer is None and one.error is None), None)
    rows = []
    for one in outcomes:
        row: dict[str, Any] = {
            "name": one.variant.name,
            "reducer": None if one.variant.reducer is None else as_config(one.variant.reducer),
            "error": one.error,
        }
        if one.error is None:
            series = one.series(setting, protocol.tokens)
            per_second = [1e3 / value for value in series["ms_per_new_token"]]
            row |= {
                "prompt_length": one.prompt,
                "visual_tokens": one.visual,
                "kv_bytes": one.kv_bytes,
                "memory": one.memory,
                "flops": {
                    "phases": one.flops,
                    "operators": one.operators,
                    "encode": one.flops_of(ENCODE),
                    "to_first_token": one.flops_of(BEFORE),
                    "decode_per_step": one.flops_of([DECODE]),
                },
                "phases_ms": {name: milliseconds(took).as_data() for name, took in one.phases.items()},
                "measures": {name: Samples(tuple(values)).as_data() for name, values in series.items()}
                | {"new_tokens_per_s": Samples(tuple(per_second)).as_data()},
            }
            if plain is not None and one is not plain:
                row["ratios"] = ratios(one, plain, setting, protocol)
        rows.append(row)
    return {"batch": setting.batch, "height": setting.size[0], "width": setting.size[1], "variants": rows}


def milliseconds(seconds: Sequence[float]) -> Samples:
    """Return times that were taken in seconds."""
    return Samples(tuple(1e3 * one for one in seconds))


def ratios(one: Measurement, plain: Measurement, setting: Workload, protocol: BenchProtocol) -> dict[str, Any]:
    """Return how many times less a variant takes than the plain model: times with intervals, the rest exactly."""
    mine, theirs = one.series(setting, protocol.tokens), plain.series(setting, protocol.tokens)
    found: dict[str, Any] = {
        name.removesuffix("_ms"): Ratio.of(theirs[name], mine[name]).as_data()
        for name in mine
        if min(mine[name], default=0) > 0
    }
    # The other way round: a share of the plain model's time.
    found["own_share_of_vision_encode"] = Ratio.of(one.together(OWN), plain.together(["vision encode"])).as_data()
    found["flops_encode"] = plain.flops_of(ENCODE) / max(1, one.flops_of(ENCODE))
    found["flops_to_first_token"] = plain.flops_of(BEFORE) / one.flops_of(BEFORE)
    found["kv_bytes"] = plain.kv_bytes / one.kv_bytes if one.kv_bytes else None
    found["attained"] = found["encode_prefill"]["median"] / found["flops_to_first_token"]
    peak = "allocated" if "allocated" in one.memory else "resident"
    if one.memory.get(peak) and plain.memory.get(peak):
        found["memory"] = plain.memory[peak] / one.memory[peak]
    found["tensors"] = plain.memory["tensors"] / one.memory["tensors"]
    return found


def plain_and(reducers: Sequence[tuple[str, TokenReducer]]) -> list[Variant]:
    """Return the plain model first, then reducers by name."""
    return [Variant(PLAIN), *(Variant(name, one) for name, one in reducers)]
