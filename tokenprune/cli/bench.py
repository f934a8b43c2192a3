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


def run(argv: Sequence[str]) -> int:
    """Run the command `bench`, and return the exit code: 1 if no measurement fitted into memory, otherwise 0."""
    if argv[:1] == ["run"]:
        return run_models(argv[1:])
    description = (
        "Measure the time of selecting tokens, compared with encoding the image, in alternating rounds. "
        "To measure complete models, see `tokenprune bench run --help`."
    )
    parser = build_parser("tokenprune bench", description, SelectionCostConfig)
    text = "strategies: token selection; run: complete models"
    parser.add_argument("what", choices=["strategies", "run"], help=text)
    options = parse_options(parser, argv)
    if options.what == "run":
        raise UserError("write `run` before its options: tokenprune bench run --model mini")
    with show_status("measuring") as show_step:
        costs = measure_strategies(select_fields(SelectionCostConfig, options), on_progress=show_step)
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
        result = run_benchmark(config, on_progress)
        files = write_report(result, Path(config.out))
    if config.json:
        print(json.dumps(result))
    else:
        print_tables(result, Console())
        for file in [*files, *result["traces"]]:
            print(file)
    return int(not any(row["error"] is None for workload in result["settings"] for row in workload["variants"]))
