"""The command `tokenprune sweep`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.cli.errors import UserError
from tokenprune.cli.evaluate import parse_evaluate
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.display import format_count
from tokenprune.experiments.evaluation.experiment import Setting
from tokenprune.experiments.evaluation.records import NAME, read_lines
from tokenprune.experiments.tracking.sweep import command_line, run_local
from tokenprune.experiments.tracking.sweep_file import read_sweep


@dataclass(frozen=True)
class SweepConfig:
    """Options of `tokenprune sweep`.

    Args:
        file: sweep file in W&B's format.
        local: run the sweep on this machine; required.
        count: largest number of runs.
        seed: seed of a random search.
    """

    file: str
    local: bool = False
    count: int | None = None
    seed: int = 0


def run(argv: Sequence[str], command: Callable[[list[str]], int]) -> int:
    """Run the command `sweep`, and return the exit code of the first failed run, or 0.

    Args:
        argv: the arguments after the command.
        command: function that runs a command of `tokenprune` from its arguments and returns the exit code.
    """
    description = "Run a W&B sweep file on this machine, without an account. Repeat the command to continue."
    config = select_fields(SweepConfig, parse_options(build_parser("tokenprune sweep", description, SweepConfig), argv))
    content = read_sweep(config.file)
    if not config.local:
        raise UserError(f"add --local to run {config.file} here; with an account, use `wandb sweep` and `wandb agent`")
    if content["method"] == "bayes" and (content.get("metric") or {}).get("name") != "eval/score":
        raise UserError(f"{config.file}: method: bayes needs `metric: {{name: eval/score, goal: maximize}}` here")

    def measure(parameters: dict[str, Any]) -> float:
        return mean_score(command_line(content, parameters))

    codes = run_local(config.file, command, config.count, config.seed, measure)
    failed = [code for code in codes if code]
    print(f"{format_count(len(codes), 'run')}, {len(failed)} of them failed", file=sys.stderr)
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
    experiment, config = parse_evaluate(line[1:])
    folder = Setting(experiment, "").folder(Path(config.out))
    scores = [row["score"] for row in read_lines(folder / NAME) if row["error"] is None]
    if not scores:
        raise ValueError(f"{folder} has no answered sample")
    return float(sum(scores) / len(scores))
