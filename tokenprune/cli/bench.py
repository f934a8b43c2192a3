"""The command `tokenprune bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from rich.console import Console

from tokenprune.cli.errors import UserError
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.cli.status import show_status
from tokenprune.experiments.bench.command import BenchConfig, run_benchmark
from tokenprune.experiments.bench.report import print_tables, write_report
from tokenprune.experiments.bench.selection_cost import SelectionCostConfig, format_costs, measure_strategies

USAGE = """usage: tokenprune bench run [OPTIONS]
       tokenprune bench strategies [OPTIONS]

run measures complete models: speed, memory and FLOPs of each phase.
strategies measures the time of selecting tokens, compared with encoding the image.

`tokenprune bench run --help` and `tokenprune bench strategies --help` print their options."""


def run(argv: Sequence[str]) -> int:
    """Run the command `bench`, and return the exit code: 1 if no measurement fitted into memory, otherwise 0."""
    benchmarks = {"run": run_models, "strategies": run_strategies}
    if argv and argv[0] in benchmarks:
        return benchmarks[argv[0]](argv[1:])
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    raise UserError("name the benchmark before its options: tokenprune bench run, or tokenprune bench strategies")


def run_strategies(argv: Sequence[str]) -> int:
    """Run the command `bench strategies`, and return the exit code 0."""
    description = "Measure the time of selecting tokens, compared with encoding the image, in alternating rounds."
    parser = build_parser("tokenprune bench strategies", description, SelectionCostConfig)
    config = select_fields(SelectionCostConfig, parse_options(parser, argv))
    with show_status("measuring") as show_step:
        costs = measure_strategies(config, on_progress=show_step)
    print(format_costs(costs))
    return 0


def run_models(argv: Sequence[str]) -> int:
    """Run the command `bench run`, and return the exit code: 1 if no variant fitted into memory, otherwise 0."""
    description = "Measure a model phase by phase: plain transformers, and reducers at several budgets, in turns."
    parser = build_parser("tokenprune bench run", description, BenchConfig, file=True)
    config = select_fields(BenchConfig, parse_options(parser, argv))
    on_progress = (lambda text: None) if config.quiet else (lambda text: print(text, file=sys.stderr))
    # A user's strategy may print; with --json, stdout must hold only the JSON object.
    with redirect_stdout(sys.stderr) if config.json else nullcontext():
        if (Path(config.out) / "bench.json").exists():
            print(f"the results of an earlier run in {config.out} will be replaced", file=sys.stderr)
        result = run_benchmark(config, on_progress)
        files = write_report(result, Path(config.out))
    if config.json:
        print(json.dumps(result))
    else:
        print_tables(result, Console())
        for file in [*files, *result["traces"]]:
            print(file)
    return int(not any(row["error"] is None for workload in result["settings"] for row in workload["variants"]))
