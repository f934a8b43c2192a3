"""Runs the benchmark of complete models: the configuration of `tokenprune bench run`, and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tokenprune.adapter import Adapter
from tokenprune.budget import parse_amount
from tokenprune.cli.expressions import is_expression, split_plugins
from tokenprune.cli.options import parse_reducer
from tokenprune.experiments.bench.bench_model import BenchModel, load_bench_model, parse_image_size
from tokenprune.experiments.bench.environment import describe_environment
from tokenprune.experiments.bench.flame import profile_variants
from tokenprune.experiments.bench.measure import (
    BenchProtocol,
    Variant,
    Workload,
    find_release_budget,
    format_amount,
    keeps_all_tokens,
    list_variants,
    measure_variants,
)
from tokenprune.experiments.bench.release_like import as_supported
from tokenprune.experiments.bench.report import describe_run
from tokenprune.experiments.bench.results import as_data
from tokenprune.experiments.bench.samples import interval_rank
from tokenprune.experiments.bench.selection_cost import torch_threads
from tokenprune.reducer import TokenReducer
from tokenprune.requirements import list_missing_signals

SCHEMA = 2
"""Version of the JSON format."""


@dataclass(frozen=True)
class BenchConfig:
    """Options of `tokenprune bench run`.

    >>> BenchConfig(model="mini", budget=[0.2], repeats=3)

    Args:
        model: mini, mini-pages, a checkpoint folder or a hub id; with random weights: a config.json, or an architecture
            such as llava-v1.6-vicuna-7b.
        baseline: release also measures HiRED as in its published code at each budget below 100 %, of --budget and of
            calls; auto does so on CUDA if the model supports it; none.
        reducers: strategies or presets by name, file.py:Class, or a call with its budget
            "HiRED(0.4)+AtLayer(2, DivPrune(0.5))".
        budget: budgets: 0.2 or 20% (ratios; 1.0 or 100% keeps all tokens), 160 (tokens; 1 keeps one token).
        batches: prompts per batch, with one image each.
        sizes: height x width of the images in pixels: 672x672.
        tokens: new tokens of each prompt.
        repeats: timed rounds; below 6 no interval covers 95 %.
        warmup: untimed rounds before the timed ones.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto (float32 on a CPU), float32, bfloat16, float16.
        attn: attention kernel: sdpa, eager, flash_attention_2, ...; by default as in transformers.
        threads: CPU threads of torch; by default unchanged.
        llm_layers: number of LLM layers to keep; the output marks the model as cut.
        prompt_tokens: text tokens of a prompt for models with random weights.
        plugin: Python files with strategies, which are then available by name.
        compile: also measure each strategy below 100 % with compiled graphs; the first calls compile them.
        count: also count FLOPs, live tensors and kernel launches (CUDA) or operators, in calls of their own.
        trace: also profile a call of each variant.
        out: folder for bench.json, bench.md and phases.png.
        json: print the JSON instead of tables.
        quiet: show no progress.
    """

    model: str = "mini"
    baseline: Literal["auto", "release", "none"] = "auto"
    reducers: list[str] = field(default_factory=lambda: ["HiRED"])
    budget: list[int | float | str] = field(default_factory=lambda: [1.0, 0.4, 0.2, 0.1, 0.05])
    batches: list[int] = field(default_factory=lambda: [1])
    sizes: list[str] = field(default_factory=lambda: ["672x672"])
    tokens: int = 16
    repeats: int = 7
    warmup: int = 1
    device: str = "auto"
    dtype: str = "auto"
    attn: str | None = None
    threads: int | None = None
    llm_layers: int | None = None
    prompt_tokens: int = 32
    plugin: list[str] = field(default_factory=list)
    compile: bool = False
    count: bool = True
    trace: bool = False
    out: str = "tokenprune-bench"
    json: bool = False
    quiet: bool = False

    @property
    def protocol(self) -> BenchProtocol:
        """Length and number of the measured calls."""
        return BenchProtocol(self.tokens, self.repeats, self.warmup)


def parse_positive_amount(budget: int | float | str) -> int | float:
    """Return a budget as a ratio in (0, 1], a float, or as a number of tokens from 1, an int.

    Raises:
        ValueError: if the budget is neither.
    """
    try:
        amount = parse_amount(budget)
    except ValueError:
        amount = 0
    if amount == 0:
        raise ValueError(
            f"--budget {budget}: give ratios above 0 and up to 1, such as 0.2 or 20%, or numbers of tokens, such as 160"
        )
    return amount


def build_reducers(
    names: Sequence[str], budgets: Sequence[int | float | str], plugins: Sequence[str]
) -> list[tuple[str, TokenReducer]]:
    """Return each strategy at each budget, with a name for tables.

    A strategy that is written as a call, ``HiRED(0.4)+FastV(layer=2, budget=0.5)``, has its budget already, and is
    returned once.

    Args:
        names: names of strategies or presets, or calls.
        budgets: ratios such as 0.2 and ``"20%"``, and numbers of tokens such as 160.
        plugins: Python files of the user with further strategies.

    Raises:
        ValueError: if there is no such strategy, or a budget is neither a ratio in (0, 1] nor a number of tokens.
    """
    reducers = []
    for name in names:
        if is_expression(split_plugins(name)[0]):
            reducers.append((name, parse_reducer(["--plugin", *plugins, "--reducer", name])))
            continue
        for budget in budgets:
            amount = parse_positive_amount(budget)
            argv = ["--plugin", *plugins, "--reducer", name, "--reducer.budget", repr(amount)]
            reducer = parse_reducer(argv)
            reducers.append((f"{name.rpartition(':')[2]} {format_amount(amount)}", reducer))
    return reducers


def run_benchmark(config: BenchConfig, on_progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure all variants on all workloads, and return the result as plain data.

    Args:
        config: the options.
        on_progress: receives a text at the start of each step.

    Returns:
        The content of `bench.json`; see docs/how-to/benchmark.md.

    Raises:
        ValueError: if an option is not valid; the error names the option and the valid values.
        TypeError: if no adapter supports the model.
    """
    protocol, sizes = config.protocol, [parse_image_size(text, "--sizes") for text in config.sizes]
    for batch in config.batches:
        if batch < 1:
            raise ValueError(f"--batches {batch}: give at least 1")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"--threads {config.threads}: give at least 1")
    if config.prompt_tokens < 1:
        raise ValueError(f"--prompt-tokens {config.prompt_tokens}: give at least 1")
    reducers = build_reducers(config.reducers, config.budget, config.plugin)
    with torch_threads(config.threads or torch.get_num_threads()):
        on_progress(f"making {config.model}")
        bench_model = load_bench_model(
            config.model, config.device, config.dtype, config.attn, config.llm_layers, config.prompt_tokens
        )
        device = bench_model.model.device
        release_budgets, omitted = list_release_budgets(config, reducers, bench_model.adapter, device)
        variants = list_variants(reducers, release_budgets, config.compile)
        check_signals(bench_model, variants)
        settings, traces = [], list[Path]()
        metadata = {"model": bench_model.as_data(), "environment": describe_environment(device)}
        for size in sizes:
            for batch in config.batches:
                workload = Workload(batch, size)
                measurements = measure_variants(
                    bench_model, workload, variants, protocol, on_progress, count=config.count
                )
                settings.append(as_data(measurements, workload, protocol))
                if config.trace:
                    on_progress(f"{workload}: profiling")
                    measured = [measurement.variant for measurement in measurements if measurement.error is None]
                    heading = "\n".join(describe_run(metadata))
                    traces += profile_variants(bench_model, workload, measured, Path(config.out) / "trace", heading)
        return {
            "schema": SCHEMA,
            **metadata,
            "protocol": asdict(protocol) | {"phases_in_calls_of_their_own": device.type != "cpu"},
            "coverage": interval_rank(protocol.repeats)[1],
            "omitted": omitted,
            "settings": settings,
            "traces": [str(file) for file in traces],
        }


def list_release_budgets(
    config: BenchConfig, reducers: Sequence[tuple[str, TokenReducer]], adapter: Adapter, device: torch.device
) -> tuple[list[int | float], str | None]:
    """Return the budgets of the release-like baseline, and the reason if the model cannot run it.

    The budgets are those of the options, and those of strategies that are written as calls. Ratios are floats, numbers
    of tokens are ints. A budget of 100 % is omitted.

    Args:
        config: the options; ``baseline="auto"`` includes the baseline on CUDA only.
        reducers: names and strategies, the result of `build_reducers`.
        adapter: the adapter of the model.
        device: the device of the model.

    Raises:
        ValueError: if the options request the baseline and the model cannot run it.
    """
    if config.baseline == "none" or (config.baseline == "auto" and device.type != "cuda"):
        return [], None
    try:
        as_supported(adapter)
    except ValueError as error:
        if config.baseline == "release":
            raise ValueError(f"--baseline release: {error}") from error
        return [], str(error)
    amounts = [parse_positive_amount(budget) for budget in config.budget]
    listed = [amount for amount in amounts if not keeps_all_tokens(amount)]
    of_calls = [amount for _, reducer in reducers if (amount := find_release_budget(reducer)) is not None]
    return list(dict.fromkeys([*listed, *of_calls])), None


def check_signals(bench_model: BenchModel, variants: Sequence[Variant]) -> None:
    """Check that the model has the signals of all strategies, before any of them runs.

    Raises:
        ValueError: if the model lacks a signal that a strategy requires.
    """
    for variant in variants:
        missing = [] if variant.reducer is None else list_missing_signals(variant.reducer, bench_model.adapter)
        if missing:
            raise ValueError(
                f"{variant.name} needs {', '.join(missing)}, which {type(bench_model.model).__name__} with this vision "
                "tower does not have; remove it from --reducers"
            )
