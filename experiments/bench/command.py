"""Implements the command `tokenprune bench run`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from tokenprune.budget import parse_ratio
from tokenprune.cli.parsing import prepare
from tokenprune.experiments.bench.bench_model import BenchModel, Size, load_bench_model
from tokenprune.experiments.bench.environment import describe_environment
from tokenprune.experiments.bench.flame import profile_variants
from tokenprune.experiments.bench.measure import (
    BenchProtocol,
    Variant,
    Workload,
    as_data,
    measure_variants,
    with_plain_variant,
)
from tokenprune.experiments.bench.report import describe_run, print_tables, write_report
from tokenprune.experiments.bench.samples import interval_rank
from tokenprune.experiments.bench.selection_cost import torch_threads
from tokenprune.pipeline import list_missing_signals
from tokenprune.reducer import TokenReducer

SCHEMA = 1
"""Version of the JSON format."""
FLAG = {"type": bool, "nargs": "?", "const": True}
"""Arguments of an option that is off by default: `--NAME` turns it on, and a configuration file may set it."""


@dataclass(frozen=True)
class BenchConfig:
    """Options of `tokenprune bench run`.

    Each field declares the option of the same name. Its metadata holds the arguments of `ArgumentParser.add_argument`.

    >>> BenchConfig(model="mini", budgets=[0.2], repeats=3)
    """

    model: str = field(
        default="mini",
        metadata={
            "help": "mini, a checkpoint folder or a hub id; with random weights: a config.json, or an architecture "
            "such as llava-v1.6-vicuna-7b"
        },
    )
    reducers: list[str] = field(
        default_factory=lambda: ["HiRED"],
        metadata={"help": "strategies or presets by name, or file.py:Class", "type": str, "nargs": "+"},
    )
    budgets: list[float | str] = field(
        default_factory=lambda: [1.0, 0.4, 0.2, 0.1, 0.05],
        metadata={"help": "budgets as ratios: 0.2 or 20%%", "type": float | str, "nargs": "+"},
    )
    batches: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "prompts per batch, with one image each", "type": int, "nargs": "+"},
    )
    sizes: list[str] = field(
        default_factory=lambda: ["672x672"],
        metadata={"help": "height x width of the images in pixels: 672x672", "type": str, "nargs": "+"},
    )
    tokens: int = field(default=16, metadata={"help": "new tokens of each prompt", "type": int})
    repeats: int = field(default=7, metadata={"help": "timed rounds; below 6 no interval covers 95 %%", "type": int})
    warmup: int = field(default=1, metadata={"help": "untimed rounds before the timed ones", "type": int})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, ..."})
    dtype: str = field(default="auto", metadata={"help": "auto (float32 on a CPU), float32, bfloat16, float16"})
    attn: str | None = field(
        default=None,
        metadata={
            "help": "attention kernel: sdpa, eager, flash_attention_2, ...; by default as in transformers",
            "type": str,
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads of torch; by default unchanged", "type": int}
    )
    llm_layers: int | None = field(
        default=None,
        metadata={"help": "number of LLM layers to keep; the output marks the model as cut", "type": int},
    )
    prompt_tokens: int = field(
        default=32, metadata={"help": "text tokens of a prompt for models with random weights", "type": int}
    )
    plugin: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Python files with strategies, which are then available by name",
            "type": str,
            "nargs": "+",
        },
    )
    trace: bool = field(default=False, metadata={"help": "also profile a call of each variant", **FLAG})
    out: str = field(default="tokenprune-bench", metadata={"help": "folder for bench.json, bench.md and phases.png"})
    json: bool = field(default=False, metadata={"help": "print the JSON instead of tables", **FLAG})
    quiet: bool = field(default=False, metadata={"help": "show no progress", **FLAG})

    @property
    def protocol(self) -> BenchProtocol:
        """Length and number of the measured calls."""
        return BenchProtocol(self.tokens, self.repeats, self.warmup)


def build_bench_parser() -> ArgumentParser:
    """Return the parser of `tokenprune bench run`, with an option for each field of `BenchConfig`."""
    parser = ArgumentParser(
        prog="tokenprune bench run",
        exit_on_error=False,
        allow_abbrev=False,
        description="Measure a model phase by phase: plain transformers, and reducers at several budgets, in turns.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    defaults = BenchConfig()
    for option in fields(BenchConfig):
        name = f"--{option.name.replace('_', '-')}"
        parser.add_argument(name, default=getattr(defaults, option.name), **option.metadata)
    return parser


def parse_image_size(text: str) -> Size:
    """Return height and width in pixels from a text such as `672x672`.

    Raises:
        ValueError: if the text is not a size.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(int(side) for side in match.groups()):
        raise ValueError(f"--sizes {text}: give height x width in pixels, such as 672x672")
    return int(match[1]), int(match[2])


def parse_positive_ratio(budget: float | str) -> float:
    """Return a budget as a ratio in (0, 1].

    Raises:
        ValueError: if the budget is not such a ratio.
    """
    try:
        ratio = parse_ratio(budget)
    except ValueError:
        ratio = 0.0
    if ratio == 0:
        text = str(budget).removesuffix(".0")
        raise ValueError(f"--budgets {text}: give ratios above 0 and up to 1, such as 0.2 or 20%")
    return ratio


def build_reducers(
    names: Sequence[str], budgets: Sequence[float | str], plugins: Sequence[str]
) -> list[tuple[str, TokenReducer]]:
    """Return each strategy at each budget, with a name for tables.

    Args:
        names: names of strategies or presets.
        budgets: ratios, as numbers or as texts such as ``"20%"``.
        plugins: Python files of the user with further strategies.

    Raises:
        LookupError: if there is no such strategy.
        ValueError: if a budget is not a ratio in (0, 1].
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--plugin", type=list[str], default=[])
    parser.add_argument("--reducer", type=TokenReducer)
    reducers = []
    for name in names:
        for budget in budgets:
            ratio = parse_positive_ratio(budget)
            argv = [argument for plugin in plugins for argument in ("--plugin", plugin)]
            argv += ["--reducer", name, "--reducer.budget", repr(ratio)]
            reducer: TokenReducer = parser.instantiate(parser.parse_args(prepare(argv))).reducer
            reducers.append((f"{name.rpartition(':')[2]} {100 * ratio:g} %", reducer))
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
        LookupError: if there is no such strategy.
        TypeError: if no adapter supports the model.
    """
    protocol, sizes = config.protocol, [parse_image_size(text) for text in config.sizes]
    for batch in config.batches:
        if batch < 1:
            raise ValueError(f"--batches {batch}: give at least 1")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"--threads {config.threads}: give at least 1")
    if config.prompt_tokens < 1:
        raise ValueError(f"--prompt-tokens {config.prompt_tokens}: give at least 1")
    variants = with_plain_variant(build_reducers(config.reducers, config.budgets, config.plugin))
    with torch_threads(config.threads or torch.get_num_threads()):
        on_progress(f"making {config.model}")
        bench_model = load_bench_model(
            config.model, config.device, config.dtype, config.attn, config.llm_layers, config.prompt_tokens
        )
        check_signals(bench_model, variants)
        settings, traces = [], list[Path]()
        device = bench_model.model.device
        metadata = {"model": bench_model.as_data(), "environment": describe_environment(device)}
        for size in sizes:
            for batch in config.batches:
                workload = Workload(batch, size)
                measurements = measure_variants(bench_model, workload, variants, protocol, on_progress)
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
            "settings": settings,
            "traces": [str(file) for file in traces],
        }


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


def run_command(options: Any) -> int:
    """Run the command, and return its exit code: 1 if no variant fit into memory, otherwise 0.

    Args:
        options: the parsed options.
    """
    config = BenchConfig(**{option.name: options[option.name] for option in fields(BenchConfig)})
    on_progress = (lambda text: None) if config.quiet else (lambda text: print(text, file=sys.stderr))
    # A user's strategy may print; with --json, stdout must hold only the JSON object.
    with redirect_stdout(sys.stderr) if config.json else nullcontext():
        result = run_benchmark(config, on_progress)
        files = write_report(result, Path(config.out))
    if config.json:
        print(json.dumps(result))
    else:
        print_tables(result, Console())
        for file in [*files, *result["traces"]]:
            print(file)
    return int(not any(row["error"] is None for workload in result["settings"] for row in workload["variants"]))
