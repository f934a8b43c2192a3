"""Runs W&B sweep files on this machine without an account, with the same YAML and the same command lines.

`method: grid` and `method: random` are implemented here. Bayesian search requires W&B's server or its open library
`sweeps`. `format_arguments` returns the same arguments that the agent passes for the macro `${args}`, so that one sweep
file works in both places.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.experiments.tracking.sweep_file import read_sweep
from tokenprune.experiments.tracking.sweep_runs import count_runs, generate_runs

log = logging.getLogger(__name__)
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""Default command of W&B."""


def format_arguments(parameters: Mapping[str, Any]) -> list[str]:
    """Return the command-line arguments of W&B's macro `${args}`, with parents before their children.

    Args:
        parameters: values by name; dictionaries are formatted as Python literals.
    """
    # The name of a parent is a prefix of its children's names, so alphabetical order, as in W&B, puts it first.
    return [f"--{name}={parameters[name]}" for name in sorted(parameters)]


def build_command(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Return the command line of one run, equal to the command line of W&B's agent.

    Args:
        config: the sweep configuration.
        parameters: the parameters of the run.

    Raises:
        ValueError: if the command contains an unsupported macro.
    """
    command: list[str] = []
    for chunk in config.get("command") or DEFAULT_COMMAND:
        word = re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda match: os.environ.get(match[1], match[1]), str(chunk))
        if word == "${args}":
            command += format_arguments(parameters)
        elif word == "${program}":
            command.append(str(config.get("program", "tokenprune")))
        elif word == "${interpreter}":
            command.append("python")
        elif word == "${env}":
            command.append("/usr/bin/env")
        elif re.fullmatch(r"\$\{.*\}", word):
            raise ValueError(f"command: {word} is not supported; the command line of tokenprune takes ${{args}}")
        else:
            command.append(word)
    return command


def run_local(
    config_path: str | Path,
    command: Callable[[list[str]], int],
    count: int | None = None,
    seed: int = 0,
    measure: Callable[[dict[str, Any]], float] | None = None,
) -> list[int]:
    """Run a sweep file on this machine, one run after another, and return the exit codes.

    A failed run does not stop the sweep; Ctrl-C stops it. This function stores no progress. A stopped sweep can resume
    because `tokenprune evaluate` names its results by the configuration and skips existing records.

    Args:
        config_path: path of the sweep file.
        command: runs one command of `tokenprune` from its arguments, and returns the exit code.
        count: maximum number of runs.
        seed: seed of a random or Bayesian search.
        measure: returns the metric of a finished run from its parameters; `method: bayes` requires it.

    Returns:
        The exit codes of the started runs.

    Raises:
        ValueError: if the sweep cannot be run here.
    """
    config = read_sweep(config_path)
    if config["method"] == "bayes" and measure is None:
        raise ValueError(f"{config_path}: method: bayes requires the metric of finished runs; give `measure`")
    if "early_terminate" in config:
        log.warning("%s: early_terminate requires W&B's server; here every run is completed", config_path)
    proposals, total = generate_runs(config, count, seed), count_runs(config, count)
    codes: list[int] = []
    failed: list[str] = []
    parameters = next(proposals, None)
    while parameters is not None:
        line = command_line(config, parameters)
        log.info("run %d of %s: tokenprune %s", len(codes) + 1, total, " ".join(line))
        codes.append(command(line))
        if codes[-1]:
            failed.append(" ".join(line))
            log.warning("run %d of %s ended with code %d: tokenprune %s", len(codes), total, codes[-1], failed[-1])
        if codes[-1] == 130:
            log.warning("stopped after %d of %s runs; run the same command to resume", len(codes), total)
            break
        try:
            if isinstance(proposals, Generator) and config["method"] == "bayes" and measure is not None:
                parameters = proposals.send(None if codes[-1] else measure(parameters))
            else:
                parameters = next(proposals)
        except StopIteration:
            break
    return codes


def command_line(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Return the arguments after `tokenprune` of one run.

    Args:
        config: the sweep configuration.
        parameters: the parameters of the run.

    Raises:
        ValueError: if the command of the sweep runs another program.
    """
    return _after_program(build_command(config, parameters))


def _after_program(line: Sequence[str]) -> list[str]:
    """Return the arguments after `tokenprune`.

    Raises:
        ValueError: if the command runs another program.
    """
    prefix = list(itertools.takewhile(lambda word: word != "tokenprune", line))
    if len(prefix) == len(line) or not set(prefix) <= {"/usr/bin/env", "python", "python3", "-m"}:
        raise ValueError(
            f"the command {' '.join(line)!r} does not run tokenprune; "
            'write command: ["${env}", "tokenprune", "evaluate", "${args}"]'
        )
    return list(line[len(prefix) + 1 :])
