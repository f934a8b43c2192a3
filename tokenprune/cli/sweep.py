"""The command `tokenprune sweep`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from tokenprune.cli.errors import UserError, add_flag, parse_options
from tokenprune.cli.evaluate import evaluate_parser
from tokenprune.experiments.evaluation.experiment import Setting
from tokenprune.experiments.evaluation.grid import parse_experiment
from tokenprune.experiments.evaluation.records import NAME, read_lines
from tokenprune.experiments.tracking.sweep import command_line, run_local
from tokenprune.experiments.tracking.sweep_file import read_sweep


def run(argv: Sequence[str], command: Callable[[list[str]], int]) -> int:
    """Run the command `sweep`, and return the exit code of the first failed run, or 0.

    Args:
        argv: the arguments after the command.
        command: function that runs a command of `tokenprune` from its arguments and returns the exit code.
    """
    parser = ArgumentParser(
        prog="tokenprune sweep",
        exit_on_error=False,
        allow_abbrev=False,
        description="Run a W&B sweep file on this machine, without an account. Repeat the command to continue.",
    )
    parser.add_argument("file", type=str, help="sweep file in W&B's format")
    add_flag(parser, "--local", "run the sweep on this machine; required")
    parser.add_argument("--count", type=int, help="largest number of runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of a random search")
    config = parse_options(parser, argv)
    if not config.local:
        raise UserError(f"add --local to run {config.file} here; with an account, use `wandb sweep` and `wandb agent`")

    content = read_sweep(config.file)
    if content["method"] == "bayes" and (content.get("metric") or {}).get("name") != "eval/score":
        raise UserError(f"{config.file}: method: bayes needs `metric: {{name: eval/score, goal: maximize}}` here")

    def measure(parameters: dict[str, Any]) -> float:
        return mean_score(command_line(content, parameters))

    codes = run_local(config.file, command, config.count, config.seed, measure)
    failed = [code for code in codes if code]
    print(f"{len(codes)} runs, {len(failed)} of them failed", file=sys.stderr)
    return failed[0] if failed else 0


def mean_score(line: Sequence[str]) -> float:
    """Return the mean score of a finished experiment from its records; samples that failed do not count.

    Args:
        line: the arguments after `tokenprune` that ran it.

    Raises:
        ValueError: if they run another command, or no sample was answered.
    """
    if line[:1] != ["evaluate"]:
        raise ValueError(f"method: bayes reads the records of `tokenprune evaluate`, not of {' '.join(line[:1])!r}")
    options = Namespace()  # type: ignore[no-untyped-call]
    setting = Setting(parse_experiment(line[1:], evaluate_parser(), options), "")
    scores = [row["score"] for row in read_lines(setting.folder(Path(options.out)) / NAME) if row["error"] is None]
    if not scores:
        raise ValueError(f"{setting.folder(Path(options.out))} has no answered sample")
    return float(sum(scores) / len(scores))
