"""The command `tokenprune bench run`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from tokenprune.budget import ratio_of
from tokenprune.cli.errors import add_flag
from tokenprune.cli.parsing import prepare
from tokenprune.experiments.bench.bench_model import BenchModel, Size, subject
from tokenprune.experiments.bench.environment import environment
from tokenprune.experiments.bench.flame import trace
from tokenprune.experiments.bench.measure import (
    BenchProtocol,
    Measurement,
    Variant,
    Workload,
    as_data,
    measure,
    plain_and,
)
from tokenprune.experiments.bench.report import as_table, what_ran, write
from tokenprune.experiments.bench.samples import interval_rank
from tokenprune.experiments.bench.selection_cost import torch_threads
from tokenprune.pipeline import missing_signals
from tokenprune.reducer import TokenReducer

SCHEMA = 1
"""Version of the JSON."""


def bench_parser() -> ArgumentParser:
    """Return the parser of `tokenprune bench run`."""
    parser = ArgumentParser(
        prog="tokenprune bench run",
        exit_on_error=False,
        allow_abbrev=False,
        description="Measure a model phase by phase: plain transformers, and reducers at several budgets, in turns.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add(
        "--model",
        default="mini",
        help="mini, a checkpoint folder or a hub id; with random weights: a config.json, or an architecture such as "
        "llava-v1.6-vicuna-7b",
    )
    add("--reducers", type=str, nargs="+", default=["HiRED"], help="strategies or presets by name, or file.py:Class")
    add(
        "--budgets",
        type=float | str,
        nargs="+",
        default=[1.0, 0.4, 0.2, 0.1, 0.05],
        help="budgets as ratios: 0.2 or 20%%",
    )
    add("--batches", type=int, nargs="+", default=[1], help="prompts at once, one image each")
    add("--sizes", type=str, nargs="+", default=["672x672"], help="height x width of the images in pixels: 672x672")
    add("--tokens", type=int, default=16, help="new tokens of each prompt")
    add("--repeats", type=int, default=7, help="timed rounds; below 6 no interval covers 95 %%")
    add("--warmup", type=int, default=1, help="untimed rounds before")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", help="auto (float32 on a CPU), float32, bfloat16, float16")
    add("--attn", type=str, help="attention kernel: sdpa, eager, flash_attention_2, ...; the model's own if left out")
    add("--threads", type=int, help="CPU threads of torch; its own number if left out")
    add("--llm-layers", type=int, help="keep only so many layers of the LLM; the output says so")
    add("--prompt-tokens", type=int, default=32, help="text tokens of a prompt, with random weights")
    add("--plugin", type=str, nargs="+", default=[], help="Python files whose strategies get known by name")
    add_flag(parser, "--trace", "also profile a call of each variant")
    add("--out", default="tokenprune-bench", help="folder for bench.json, bench.md and phases.png")
    add_flag(parser, "--json", "print the JSON instead of tables")
    add_flag(parser, "--quiet", "show no progress")
    return parser


@dataclass(frozen=True)
class BenchConfig:
    """What is to be measured; see `tokenprune bench run --help`."""

    model: str = "mini"
    reducers: Sequence[str] = ("HiRED",)
    budgets: Sequence[float | str] = (1.0, 0.4, 0.2, 0.1, 0.05)
    batches: Sequence[int] = (1,)
    sizes: Sequence[str] = ("672x672",)
    protocol: BenchProtocol = field(default_factory=BenchProtocol)
    device: str = "auto"
    dtype: str = "auto"
    attn: str | None = None
    threads: int | None = None
    llm_layers: int | None = None
    prompt_tokens: int = 32
    plugins: Sequence[str] = ()
    trace: Path | None = None


def size_of(text: str) -> Size:
    """Return height and width out of `672x672`.

    Raises:
        ValueError: if it is no size.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or not all(int(one) for one in found.groups()):
        raise ValueError(f"--sizes {text}: give height x width in pixels, such as 672x672")
    return int(found[1]), int(found[2])


def positive_ratio(budget: float | str) -> float:
    """Return a budget as a ratio.

    Raises:
        ValueError: if it is not above 0 and at most 1.
    """
    try:
        ratio = ratio_of(budget)
    except ValueError:
        ratio = 0.0
    if ratio == 0:
        text = str(budget).removesuffix(".0")
        raise ValueError(f"--budgets {text}: give ratios above 0 and up to 1, such as 0.2 or 20%")
    return ratio


def named_reducers(
    names: Sequence[str], budgets: Sequence[float | str], plugins: Sequence[str]
) -> list[tuple[str, TokenReducer]]:
    """Return strategies at all budgets with a name each.

    Args:
        names: strategies or presets.
        budgets: ratios, as numbers or as texts such as ``"20%"``.
        plugins: Python files of the user.

    Raises:
        LookupError: if a strategy is not known.
        ValueError: if a budget is no ratio.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--plugin", type=list[str], default=[])
    parser.add_argument("--reducer", type=TokenReducer)
    found = []
    for name in names:
        for budget in budgets:
            ratio = positive_ratio(budget)
            words = [part for plugin in plugins for part in ("--plugin", plugin)]
            words += ["--reducer", name, "--reducer.budget", repr(ratio)]
            reducer: TokenReducer = parser.instantiate(parser.parse_args(prepare(words))).reducer
            found.append((f"{name.rpartition(':')[2]} {100 * ratio:g} %", reducer))
    return found


def run(request: BenchConfig, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure everything that was asked for.

    Args:
        request: what is to be measured.
        tell: is told what is done.

    Returns:
        The result as plain data: see docs/results/performance.md.

    Raises:
        ValueError: if an option cannot be used; it says which and what to do.
        LookupError: if a strategy is not known.
        TypeError: if no adapter knows the model.
    """
    sizes = [size_of(one) for one in request.sizes]
    for batch in request.batches:
        if batch < 1:
            raise ValueError(f"--batches {batch}: give at least 1")
    if request.threads is not None and request.threads < 1:
        raise ValueError(f"--threads {request.threads}: give at least 1")
    if request.prompt_tokens < 1:
        raise ValueError(f"--prompt-tokens {request.prompt_tokens}: give at least 1")
    variants = plain_and(named_reducers(request.reducers, request.budgets, request.plugins))
    with torch_threads(request.threads or torch.get_num_threads()):
        tell(f"making {request.model}")
        made = subject(
            request.model, request.device, request.dtype, request.attn, request.llm_layers, request.prompt_tokens
        )
        check(made, variants)
        settings, traced = [], list[Path]()
        about = {"model": made.as_data(), "environment": environment(made.model.device)}
        for size in sizes:
            for batch in request.batches:
                setting = Workload(batch, size)
                outcomes: list[Measurement] = measure(made, setting, variants, request.protocol, tell)
                settings.append(as_data(outcomes, setting, request.protocol))
                if request.trace is not None:
                    tell(f"{setting}: profiling")
                    fitting = [one.variant for one in outcomes if one.error is None]
                    traced += trace(made, setting, fitting, request.trace, "\n".join(what_ran(about)))
        return {
            "schema": SCHEMA,
            **about,
            "protocol": asdict(request.protocol) | {"phases_in_calls_of_their_own": made.model.device.type != "cpu"},
            "coverage": interval_rank(request.protocol.repeats)[1],
            "settings": settings,
            "traces": [str(file) for file in traced],
        }


def check(made: BenchModel, variants: Sequence[Variant]) -> None:
    """Look at all strategies first, so that a misfit does not wait for its turn.

    Raises:
        ValueError: if the model lacks what a strategy needs.
    """
    for variant in variants:
        missing = [] if variant.reducer is None else missing_signals(variant.reducer, made.adapter)
        if missing:
            raise ValueError(
                f"{variant.name} needs {', '.join(missing)}, which {type(made.model).__name__} with this vision tower "
                "does not give; leave it out"
            )


def command(config: Any) -> int:
    """Run the command; the exit code is 1 if nothing could be measured for lack of memory.

    Args:
        config: what the parser has read.
    """
    request = BenchConfig(
        model=config.model,
        reducers=config.reducers,
        budgets=config.budgets,
        batches=config.batches,
        sizes=config.sizes,
        protocol=BenchProtocol(config.tokens, config.repeats, config.warmup),
        device=config.device,
        dtype=config.dtype,
        attn=config.attn,
        threads=config.threads,
        llm_layers=config.llm_layers,
        prompt_tokens=config.prompt_tokens,
        plugins=config.plugin,
        trace=Path(config.out) / "trace" if config.trace else None,
    )
    tell = (lambda text: None) if config.quiet else (lambda text: print(text, file=sys.stderr))
    # A strategy of the user's may print; with --json stdout holds the object and nothing else.
    with redirect_stdout(sys.stderr) if config.json else nullcontext():
        result = run(request, tell)
        files = write(result, Path(config.out))
    if config.json:
        print(json.dumps(result))
    else:
        as_table(result, Console())
        for file in [*files, *result["traces"]]:
            print(file)
    return int(not any(row["error"] is None for one in result["settings"] for row in one["variants"]))
