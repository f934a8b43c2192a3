"""The command `tokenprune bench`."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from tokenprune.budget import ratio_of
from tokenprune.cli.errors import INPUT_ERRORS, UserError, user_error
from tokenprune.cli.parsing import with_plugins
from tokenprune.experiments.bench import command
from tokenprune.experiments.bench.selection_cost import measure, report


def run(argv: Sequence[str]) -> int:
    """Run the command `bench`; the exit code is 1 if memory did not suffice for anything."""
    if argv[:1] == ["run"]:
        return run_models(argv[1:])

    parser = ArgumentParser(
        prog="tokenprune bench",
        exit_on_error=False,
        allow_abbrev=False,
        description="Measure what choosing tokens costs beside encoding the image, in turns in one run. "
        "`tokenprune bench run --help` tells how whole models are measured.",
    )
    parser.add_argument("what", choices=["strategies", "run"], help="what to measure")
    parser.add_argument("--names", type=str, nargs="+", help="strategies; all known ones if left out")
    parser.add_argument("--plugin", type=str, nargs="+", default=[], help="Python files whose strategies get known")
    parser.add_argument("--budget", type=float | str, default=0.2, help="budget as a ratio: 0.2 or 20%%")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    try:
        config = parser.parse_args(list(argv))
        known, _ = with_plugins(config.plugin)
    except (LookupError, ArgumentError) as error:
        raise user_error(error, parser) from error

    if config.what == "run":
        raise UserError("write `run` before its options: tokenprune bench run --model mini")
    print(report(measure(config.names, ratio_of(config.budget), config.repeats, config.threads, known=known)))
    return 0


def run_models(argv: Sequence[str]) -> int:
    """Run the command `bench run`."""
    parser = command.bench_parser()
    try:
        config = parser.parse_args(list(argv))
    except INPUT_ERRORS as error:
        raise user_error(error, parser) from error
    return command.command(config)
