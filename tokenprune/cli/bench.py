"""The command `tokenprune bench`."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from tokenprune.budget import parse_ratio
from tokenprune.cli.errors import INPUT_ERRORS, UserError, user_error
from tokenprune.cli.parsing import load_classes
from tokenprune.experiments.bench import command
from tokenprune.experiments.bench.selection_cost import format_costs, measure_strategies


def run(argv: Sequence[str]) -> int:
    """Run the command `bench`, and return the exit code: 1 if no measurement fitted into memory, otherwise 0."""
    if argv[:1] == ["run"]:
        return run_models(argv[1:])

    parser = ArgumentParser(
        prog="tokenprune bench",
        exit_on_error=False,
        allow_abbrev=False,
        description="Measure the time of selecting tokens, compared with encoding the image, in alternating rounds. "
        "To measure complete models, see `tokenprune bench run --help`.",
    )
    parser.add_argument("what", choices=["strategies", "run"], help="strategies: token selection; run: complete models")
    parser.add_argument("--names", type=str, nargs="+", help="names of strategies; by default all")
    parser.add_argument("--plugin", type=str, nargs="+", default=[], help="Python files with further strategies")
    parser.add_argument("--budget", type=float | str, default=0.2, help="budget as a ratio: 0.2 or 20%%")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each strategy")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    try:
        config = parser.parse_args(list(argv))
        catalog, _ = load_classes(config.plugin)
    except (LookupError, ArgumentError) as error:
        raise user_error(error, parser) from error

    if config.what == "run":
        raise UserError("write `run` before its options: tokenprune bench run --model mini")
    print(
        format_costs(
            measure_strategies(
                config.names, parse_ratio(config.budget), config.repeats, config.threads, catalog=catalog
            )
        )
    )
    return 0


def run_models(argv: Sequence[str]) -> int:
    """Run the command `bench run`."""
    parser = command.build_bench_parser()
    try:
        config = parser.parse_args(list(argv))
    except INPUT_ERRORS as error:
        raise user_error(error, parser) from error
    return command.run_command(config)
