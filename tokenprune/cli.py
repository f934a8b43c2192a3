"""The command line: `tokenprune COMMAND`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

USAGE = """usage: tokenprune COMMAND [OPTIONS]

commands:
  run       answer questions about pictures, with all visual tokens and with a strategy, side by side
  evaluate  run one experiment and write a record a sample
  ablate    run a grid of experiments, with baselines; the same command goes on after a stop
  report    tables and figures of a run directory
  sweep     run a W&B sweep file here, without an account
  list      list what is known by name: strategies, components, models
  check     check that a strategy keeps the promises of the library
  bench     measure speed, memory and FLOPs phase by phase (run), or what strategies cost (strategies)
  cost      count FLOPs and bytes of a model without running it; predict time and memory on devices

`tokenprune COMMAND --help` says more; --version prints the version; --debug shows tracebacks."""


class UserError(Exception):
    """Something that the user can mend; shown as one line."""


def run_parser() -> ArgumentParser:
    """Return the parser of `tokenprune run`."""
    from jsonargparse import ArgumentParser

    from tokenprune.reducer import TokenReducer
    from tokenprune.strategies import HiRED

    parser = ArgumentParser(
        prog="tokenprune run",
        exit_on_error=False,
        allow_abbrev=False,
        description="Answer questions about pictures with all visual tokens and with a strategy, side by side.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--plugin", type=list[str], default=[], help="Python files whose strategies get known by name")
    parser.add_argument("--model", default="mini", help="mini (embedded), a checkpoint folder, or a hub id")
    parser.add_argument("--image", type=str, nargs="+", help="picture files; left out: the bundled board")
    parser.add_argument("--question", type=str, nargs="+", help="questions; each is asked about each picture")
    parser.add_argument(
        "--reducer",
        type=TokenReducer,
        default={"class_path": f"{HiRED.__module__}.{HiRED.__qualname__}"},
        help="strategy: a class name (HiRED, hired), a preset (HiRED.release) or file.py:Class; its parameters follow "
        "as --reducer.NAME, e.g. --reducer.budget 0.2 or 20%% (ratio), --reducer.budget 160 (tokens), "
        "--reducer.selection RandomSelection --reducer.selection.seed 3",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs for the time to first token")
    parser.add_argument("--out", default="tokenprune-out", help="folder for the overlay")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", help="auto (float32 on a CPU), float32, bfloat16, float16")
    parser.add_argument(
        "--json",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="print one JSON object: the fields of the first answer, and all answers under `results`",
    )
    return parser


def run(argv: Sequence[str]) -> None:
    """Run the command `run`."""
    from tokenprune.configure import as_config, prepare

    parser = run_parser()
    try:
        config = parser.parse_args(prepare(argv))
        chosen = parser.instantiate(config)
    except (LookupError, ValueError, TypeError, _argument_error()) as error:
        raise _user_error(error, parser) from error
    from tokenprune.experiments.demo import Request, answer_all, as_json, as_table

    request = Request(
        model=chosen.model,
        images=chosen.image,
        questions=chosen.question,
        reducer=chosen.reducer,
        max_new_tokens=chosen.max_new_tokens,
        repeats=chosen.repeats,
        out=chosen.out,
        device=chosen.device,
        dtype=chosen.dtype,
    )
    # A strategy of the user's may print; with --json stdout holds the object and nothing else.
    with redirect_stdout(sys.stderr) if chosen.json else nullcontext():
        answers = answer_all(request)
    if chosen.json:
        print(as_json(request, as_config(chosen.reducer), answers))
    else:
        as_table(request, answers)


def list_names(argv: Sequence[str]) -> None:
    """Run the command `list`."""
    from jsonargparse import ArgumentParser

    from tokenprune.listing import KINDS, as_json, as_markdown, as_table

    parser = ArgumentParser(
        prog="tokenprune list",
        exit_on_error=False,
        allow_abbrev=False,
        description="List what is known by name, with its parameters.",
    )
    parser.add_argument("kind", choices=list(KINDS), help="what to list")
    parser.add_argument("--plugin", type=str, nargs="+", default=[], help="Python files whose classes are listed too")
    parser.add_argument("--json", type=bool, nargs="?", const=True, default=False, help="print JSON")
    parser.add_argument("--markdown", type=bool, nargs="?", const=True, default=False, help="print a Markdown table")
    try:
        config = parser.parse_args(list(argv))
        rows = KINDS[config.kind](config.plugin)
    except (LookupError, _argument_error()) as error:
        raise _user_error(error, parser) from error
    if config.json:
        print(as_json(rows))
    elif config.markdown:
        print(as_markdown(rows))
    else:
        as_table(rows)


def check(argv: Sequence[str]) -> int:
    """Run the command `check`; the exit code is 1 if the strategy breaks a promise."""
    import warnings
    from dataclasses import asdict

    from jsonargparse import ArgumentParser

    from tokenprune.budget import OneTokenWarning
    from tokenprune.configure import prepare
    from tokenprune.conformance import check_reducer
    from tokenprune.reducer import TokenReducer

    parser = ArgumentParser(
        prog="tokenprune check",
        usage="tokenprune check NAME | file.py:Class [--reducer.PARAMETER VALUE ...] [--json]",
        exit_on_error=False,
        allow_abbrev=False,
        description="Check that a strategy keeps the promises of the library: exact budgets, batch invariance, ...",
    )
    parser.add_argument("--plugin", type=list[str], default=[], help="Python files whose strategies get known by name")
    parser.add_argument("--reducer", type=TokenReducer, help="strategy, if it is not given as NAME")
    parser.add_argument("--json", type=bool, nargs="?", const=True, default=False, help="print JSON")
    words = ["--reducer", *argv] if argv and not argv[0].startswith("-") else list(argv)
    try:
        chosen = parser.instantiate(parser.parse_args(prepare(words)))
    except (LookupError, ValueError, TypeError, _argument_error()) as error:
        raise _user_error(error, parser) from error
    if chosen.reducer is None:
        raise UserError("name the strategy to check: tokenprune check HiRED, or tokenprune check file.py:Class")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OneTokenWarning)  # the checks themselves use a budget of one token
        report = check_reducer(chosen.reducer)
    if chosen.json:
        import json

        print(json.dumps({"passed": report.passed, **asdict(report)}))
    else:
        from tokenprune.listing import print_report

        print_report(report)
    return 0 if report.passed else 1


def bench(argv: Sequence[str]) -> int:
    """Run the command `bench`; the exit code is 1 if memory did not suffice for anything."""
    from jsonargparse import ArgumentParser

    from tokenprune.configure import with_plugins

    if argv[:1] == ["run"]:
        return bench_run(argv[1:])

    parser = ArgumentParser(
        prog="tokenprune bench",
        exit_on_error=False,
        allow_abbrev=False,
        description="Measure what choosing tokens costs beside encoding the picture, in turns in one run. "
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
    except (LookupError, _argument_error()) as error:
        raise _user_error(error, parser) from error
    from tokenprune.budget import ratio_of
    from tokenprune.experiments.selection_cost import measure, report

    if config.what == "run":
        raise UserError("write `run` before its options: tokenprune bench run --model mini")
    print(report(measure(config.names, ratio_of(config.budget), config.repeats, config.threads, known=known)))
    return 0


def bench_run(argv: Sequence[str]) -> int:
    """Run the command `bench run`."""
    from tokenprune.experiments.bench import command

    parser = command.bench_parser()
    try:
        config = parser.parse_args(list(argv))
    except (LookupError, ValueError, TypeError, _argument_error()) as error:
        raise _user_error(error, parser) from error
    return command.command(config)


def evaluate_parser() -> ArgumentParser:
    """Return the parser of `tokenprune evaluate`."""
    from tokenprune.experiments.ablation import experiment_parser

    parser = experiment_parser("tokenprune evaluate", "Run one experiment, or go on with it; write a record a sample.")
    parser.add_argument("--out", default="tokenprune-runs", help="run directory")
    parser.add_argument("--wandb", type=str, help="W&B project; without a key the run stays on this machine")
    parser.add_argument(
        "--retry-errors", type=bool, nargs="?", const=True, default=False, help="try samples again that failed before"
    )
    parser.add_argument(
        "--fresh", type=bool, nargs="?", const=True, default=False, help="discard the records that are there"
    )
    _add_pictures(parser)
    parser.add_argument("--quiet", type=bool, nargs="?", const=True, default=False, help="show no progress")
    return parser


def evaluate(argv: Sequence[str]) -> int:
    """Run the command `evaluate`; the exit code is 1 if samples failed."""
    from jsonargparse import Namespace

    from tokenprune.experiments.ablation import experiment_of
    from tokenprune.experiments.console import show
    from tokenprune.experiments.experiment import Cell, check_records, discard_records, rank_and_world
    from tokenprune.experiments.publish import run_tracked
    from tokenprune.experiments.records import forget_errors

    parser = evaluate_parser()
    own = Namespace()  # type: ignore[no-untyped-call]
    try:
        experiment = experiment_of(list(argv), parser, own)
    except (LookupError, ValueError, TypeError, _argument_error()) as error:
        raise _user_error(error, parser) from error
    cell = Cell(experiment, f"{type(experiment.reducer).__name__}, budget={experiment.reducer.budget}")
    out = Path(own.out)
    if own.fresh and rank_and_world()[1] > 1:
        raise _user_error(
            ValueError("--fresh cannot be used under torchrun; run the command once without torchrun"), parser
        )
    if own.fresh:
        discard_records([cell], out)
    if own.retry_errors:
        forget_errors(cell.folder(out))
    check_records([cell], out)  # before W&B receives records of another state
    return show(lambda tell: run_tracked(cell, out, own.wandb, *rank_and_world(), tell, own.pictures), out, own.quiet)


def ablate(argv: Sequence[str]) -> int:
    """Run the command `ablate`; the exit code is 1 if samples failed."""
    from jsonargparse import ArgumentParser

    from tokenprune.experiments import ablation
    from tokenprune.experiments.console import show
    from tokenprune.experiments.experiment import rank_and_world

    parser = ArgumentParser(
        prog="tokenprune ablate",
        exit_on_error=False,
        allow_abbrev=False,
        description="Run a grid of experiments, or go on with it: every picture is encoded once for all settings.",
    )
    parser.add_argument("grid", type=str, help="YAML file of the ablation")
    parser.add_argument("--out", type=str, help="run directory; tokenprune-runs/NAME of the file if left out")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the pictures, one a GPU")
    parser.add_argument("--shard", type=str, help="i/n: every n-th setting from the i-th on, for arrays of jobs")
    parser.add_argument("--wandb", type=str, help="W&B project; all settings are published when the grid is done")
    parser.add_argument(
        "--retry-errors", type=bool, nargs="?", const=True, default=False, help="try samples again that failed before"
    )
    parser.add_argument(
        "--fresh", type=bool, nargs="?", const=True, default=False, help="discard the records that are there"
    )
    _add_pictures(parser)
    parser.add_argument("--dry-run", type=bool, nargs="?", const=True, default=False, help="list the settings and stop")
    parser.add_argument("--quiet", type=bool, nargs="?", const=True, default=False, help="show no progress")
    config = _parsed(parser, argv)
    if config.dry_run:
        cells = ablation.shard_of(ablation.expand(ablation.load_config(config.grid)), config.shard)
        print("\n".join(f"{cell.experiment.hash()}  {cell.role:8}  {cell.name}" for cell in cells))
        print(f"{len(cells)} settings")
        return 0
    out = Path(config.out or f"tokenprune-runs/{Path(config.grid).stem}")
    grid, shard, workers, pictures = config.grid, config.shard, config.workers, config.pictures
    retry, fresh = config.retry_errors, config.fresh
    code = show(
        lambda tell: ablation.ablate(grid, out, shard, workers, tell, retry, pictures, fresh), out, config.quiet
    )
    if config.wandb is not None and rank_and_world()[0] == 0:
        from tokenprune.experiments.publish import publish

        publish(out, config.wandb)
    return code


def _add_pictures(parser: ArgumentParser) -> None:
    from jsonargparse.typing import NonNegativeInt

    from tokenprune.experiments.pictures import PICTURES

    parser.add_argument(
        "--pictures",
        type=NonNegativeInt,
        default=PICTURES,
        help="so many pictures are stored in the run directory, evenly spread, with the kept tokens in their records; "
        "a report needs them to show failures, 0 stores none",
    )


def report(argv: Sequence[str]) -> None:
    """Run the command `report`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="tokenprune report",
        exit_on_error=False,
        allow_abbrev=False,
        description="Write tables and figures of a run directory as Markdown, LaTeX, HTML and CSV, from its records.",
    )
    parser.add_argument("directory", type=str, help="run directory of `ablate` or `evaluate`")
    parser.add_argument("--out", type=str, help="folder for the report; DIRECTORY itself if left out")
    parser.add_argument(
        "--compare",
        type=str,
        nargs=2,
        metavar=("A", "B"),
        help="names or hashes of two settings whose failures are shown side by side; left out, the best two at the "
        "smallest budget",
    )
    parser.add_argument(
        "--parquet", type=bool, nargs="?", const=True, default=False, help="write Parquet beside CSV; needs pyarrow"
    )
    config = _parsed(parser, argv)
    from tokenprune.experiments.report import write_report

    out = None if config.out is None else Path(config.out)
    for file in write_report(Path(config.directory), out, config.compare, config.parquet):
        print(file)


def sweep(argv: Sequence[str]) -> int:
    """Run the command `sweep`; the exit code is that of the first run that failed."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="tokenprune sweep",
        exit_on_error=False,
        allow_abbrev=False,
        description="Run a W&B sweep file on this machine, without an account; the same command goes on.",
    )
    parser.add_argument("file", type=str, help="sweep file in W&B's format")
    parser.add_argument("--local", type=bool, nargs="?", const=True, default=False, help="run it here; needed")
    parser.add_argument("--count", type=int, help="at most so many runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of a random search")
    config = _parsed(parser, argv)
    if not config.local:
        raise UserError(f"say --local to run {config.file} here; with an account, use `wandb sweep` and `wandb agent`")
    from tokenprune.experiments.sweep import run_local

    codes = run_local(config.file, count=config.count, seed=config.seed)
    failed = [code for code in codes if code]
    print(f"{len(codes)} runs, {len(failed)} of them failed", file=sys.stderr)
    return failed[0] if failed else 0


def cost(argv: Sequence[str]) -> None:
    """Run the command `cost`."""
    from tokenprune.experiments.cost.report import cost_parser, run

    run(_parsed(cost_parser(), argv))


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "run": run,
    "evaluate": evaluate,
    "ablate": ablate,
    "report": report,
    "sweep": sweep,
    "list": list_names,
    "check": check,
    "bench": bench,
    "cost": cost,
}


def _user_error(error: Exception, parser: ArgumentParser) -> UserError:
    """Return an error of the command line as one line that names the nearest option."""
    from tokenprune.configure import one_line

    return UserError(one_line(error, [option for action in parser._actions for option in action.option_strings]))


def _parsed(parser: ArgumentParser, argv: Sequence[str]) -> Any:
    """Return the options of a command that takes no classes by name."""
    try:
        return parser.parse_args(list(argv))
    except _argument_error() as error:
        raise _user_error(error, parser) from error


def _argument_error() -> type[Exception]:
    import argparse

    return argparse.ArgumentError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `tokenprune`; those of the process if left out.

    Returns:
        The exit code: 0, 1 if a check failed, 2 for an error that the user can mend, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["--version"]:
        from tokenprune import __version__

        print(f"tokenprune {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    try:
        if words[0] not in COMMANDS:
            raise UserError(f"there is no command {words[0]!r}; the commands are {', '.join(COMMANDS)}")
        return COMMANDS[words[0]](words[1:]) or 0
    except SystemExit as stop:  # --help and --print_config of a command
        return int(stop.code or 0)
    except KeyboardInterrupt:
        if debug:
            raise
        print("tokenprune: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, (UserError, ValueError, LookupError, TypeError, OSError, RuntimeError))
        hint = "" if known else f" ({type(error).__name__}; --debug shows where)"
        print(f"tokenprune: {text}{hint}", file=sys.stderr)
        return 2
