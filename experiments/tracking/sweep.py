"""W&B sweep files, run on this machine without an account: the same YAML, the same command lines.

`method: grid` and `method: random` are done here. Bayesian search needs W&B's server, or its open library `sweeps`.
`arguments` returns what the agent passes for the macro `${args}`, so that a sweep that runs here runs there.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import math
import os
import random
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

log = logging.getLogger(__name__)

DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""W&B's own."""
NEEDS_SERVER = (
    "method: bayes chooses each run by the results of those before it; create the sweep at W&B (wandb sweep FILE, then "
    "wandb agent ID), or install W&B's library into an environment of its own (pip install sweeps; it needs numpy < 2)"
)
BOUNDED = frozenset({"uniform", "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values"})
"""Distributions between min and max; those ending in `_values` give these as values, the others as exponents of e."""
QUANTISED = frozenset({"uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta"})
"""Distributions that may be rounded to multiples of q: `q_uniform`, ..."""


def read(path: str | Path) -> dict[str, Any]:
    """Return a sweep file, checked.

    Args:
        path: YAML file in W&B's format.

    Raises:
        ValueError: if the file cannot be read or is no sweep that can be run.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    try:
        return check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check(config: Any) -> dict[str, Any]:
    """Return a sweep if it can be run.

    Args:
        config: what a sweep file says.

    Raises:
        ValueError: if a part of it is missing or means nothing.
    """
    if not isinstance(config, dict) or not isinstance(config.get("parameters"), dict) or not config["parameters"]:
        raise ValueError("a sweep is a mapping with `method` and `parameters`")
    if config.get("method") not in ("grid", "random", "bayes"):
        raise ValueError(f"method: {config.get('method')!r} is not known; use grid, random or bayes")
    cap = config.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise ValueError(f"run_cap: {cap!r} is no positive whole number")
    for path, spec in leaves(config["parameters"]):
        name, kind = ".".join(path), distribution(".".join(path), spec)
        if config["method"] == "grid" and kind not in ("constant", "categorical", "int_uniform", "q_uniform"):
            raise ValueError(f"{name}: a grid has no place for {kind}; list its `values`")
        for value in _scalars([spec.get("value", ""), spec.get("values", "")]):
            if isinstance(value, float) and value.is_integer():
                # In its library `sweeps`, W&B says that 3000000.0 comes back from the server as 3000000.
                log.warning(
                    "%s: W&B's server may pass %s as %d; a budget of 1 is one token, write 100%% for all tokens",
                    *(name, value, value),
                )
            elif value is None:
                log.warning("%s: W&B passes null as the word None; leave the parameter out instead", name)
    return config


def _scalars(value: Any) -> Iterator[Any]:
    """Yield what stands at the ends of nested lists and dictionaries."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _scalars(inner)
    else:
        yield value


def leaves(parameters: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Return path and specification of every parameter, sorted by name as W&B does.

    Args:
        parameters: parameters; one with `parameters` of its own becomes a dictionary.
        prefix: path to them.

    Raises:
        ValueError: if a parameter has no specification.
    """
    found: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for name in sorted(parameters, key=str):
        spec, path = parameters[name], (*prefix, str(name))
        if not isinstance(spec, dict):
            raise ValueError(f"{'.'.join(path)}: write `value: {spec}` or `values: [...]`")
        if isinstance(spec.get("parameters"), dict) and set(spec) == {"parameters"}:
            found += leaves(spec["parameters"], path)
        else:
            found.append((path, spec))
    return found


def distribution(name: str, spec: Mapping[str, Any]) -> str:
    """Return how a parameter is distributed: what is written, or what W&B takes its keys for.

    Args:
        name: name of the parameter.
        spec: its specification.

    Raises:
        ValueError: if keys are missing, of no use, or out of order.
    """
    bounds = [spec.get("min"), spec.get("max")]
    whole = all(isinstance(bound, int) for bound in bounds)
    kind = spec.get("distribution") or (
        "constant" if "value" in spec else "categorical" if "values" in spec else "int_uniform" if whole else "uniform"
    )
    base = kind.removeprefix("q_") if kind.startswith("q_") and kind.removeprefix("q_") in QUANTISED else kind
    needed, optional = {"min", "max"}, {"q"} if base != kind else set()
    if kind in ("constant", "categorical"):
        needed = {"value"} if kind == "constant" else {"values"}
        optional = {"probabilities"} if kind == "categorical" else set()
    elif kind == "categorical_w_probabilities":
        needed = {"values", "probabilities"}
    elif base in ("normal", "log_normal"):
        needed, optional = set(), optional | {"mu", "sigma"}
    elif base == "beta":
        needed, optional = set(), optional | {"a", "b"}
    elif kind != "int_uniform" and base not in BOUNDED:
        raise ValueError(f"{name}: there is no distribution {kind!r}")
    if missing := needed - set(spec):
        raise ValueError(f"{name}: {', '.join(sorted(missing))} is missing; give value, values, or min and max")
    if odd := set(spec) - needed - optional - {"distribution"}:
        raise ValueError(f"{name}: {', '.join(sorted(odd))} means nothing here ({kind})")
    if "values" in spec and (not isinstance(spec["values"], list) or not spec["values"]):
        raise ValueError(f"{name}: values is a list with something in it")
    if "probabilities" in spec and len(spec["probabilities"]) != len(spec["values"]):
        raise ValueError(f"{name}: give one probability for each of the {len(spec['values'])} values")
    if needed == {"min", "max"} and not spec["min"] <= spec["max"]:
        raise ValueError(f"{name}: min {spec['min']} is above max {spec['max']}")
    return str(kind)


def number_of_runs(config: Mapping[str, Any], count: int | None = None) -> int | None:
    """Return how many runs a sweep makes; None if it has no end.

    Args:
        config: a sweep.
        count: at most so many.
    """
    limits = [limit for limit in (count, config.get("run_cap")) if limit is not None]
    if config["method"] == "grid":
        limits.append(math.prod(len(_grid_values(spec)) for _, spec in leaves(config["parameters"])))
    return min(limits, default=None)


def runs(config: Mapping[str, Any], count: int | None = None, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Return the parameters of each run.

    A grid comes in W&B's order: parameters by name, the last one fastest. The first n random draws of a seed are the
    same whatever the count. For `bayes`, send the result of each run to the iterator, or None if it failed.

    Args:
        config: a sweep.
        count: at most so many; a random search needs it or `run_cap`.
        seed: seed of a random or Bayesian search.

    Raises:
        ValueError: if the sweep cannot be run here.
    """
    check(config)
    number = number_of_runs(config, count)
    if number is None:
        raise ValueError(f"method: {config['method']} has no end; give a count, or `run_cap` in the file")
    if config["method"] == "bayes":
        return _bayes(config, number, seed)
    parameters = leaves(config["parameters"])
    if config["method"] == "grid":
        draws: Iterator[Sequence[Any]] = itertools.product(*(_grid_values(spec) for _, spec in parameters))
    else:
        chance = random.Random(seed)
        draws = ([_draw(name[-1], spec, chance) for name, spec in parameters] for _ in itertools.count())
    names = [path for path, _ in parameters]
    return (_nested(names, values) for values in itertools.islice(draws, number))


def arguments(parameters: Mapping[str, Any]) -> list[str]:
    """Return the words that W&B's macro `${args}` stands for; parents come before their children.

    Args:
        parameters: values by name; dictionaries are passed as Python writes them.
    """
    # A parent's name is the beginning of its children's, so the alphabet, which is W&B's order too, has it first.
    return [f"--{name}={parameters[name]}" for name in sorted(parameters)]


def words(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Return the command line of one run, as the agent would make it.

    Args:
        config: a sweep.
        parameters: the parameters of the run.

    Raises:
        ValueError: if its command has a macro that is of no use here.
    """
    made: list[str] = []
    for chunk in config.get("command") or DEFAULT_COMMAND:
        word = re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda found: os.environ.get(found[1], found[1]), str(chunk))
        if word == "${args}":
            made += arguments(parameters)
        elif word == "${program}":
            made.append(str(config.get("program", "tokenprune")))
        elif word == "${interpreter}":
            made.append("python")
        elif word == "${env}":
            made.append("/usr/bin/env")
        elif re.fullmatch(r"\$\{.*\}", word):
            raise ValueError(f"command: {word} is not supported; the command line of tokenprune takes ${{args}}")
        else:
            made.append(word)
    return made


def run_local(
    config_path: str | Path,
    command: Callable[[list[str]], int],
    count: int | None = None,
    seed: int = 0,
    measure: Callable[[dict[str, Any]], float] | None = None,
) -> list[int]:
    """Run a sweep file on this machine, one run after the other.

    A run that fails does not stop the others; Ctrl-C does. Nothing is kept here about what is done already: a command
    that names its results by its configuration goes on where it was.

    Args:
        config_path: sweep file.
        command: runs one command of `tokenprune` from its arguments, and returns the exit code.
        count: at most so many runs.
        seed: seed of a random or Bayesian search.
        measure: returns the metric of a finished run from its parameters; `method: bayes` requires it.

    Returns:
        The exit codes of the runs that were started.

    Raises:
        ValueError: if the sweep cannot be run here.
    """
    config = read(config_path)
    if config["method"] == "bayes" and measure is None:
        raise ValueError(f"{config_path}: method: bayes needs the metric of finished runs; give `measure`")
    if "early_terminate" in config:
        log.warning("%s: early_terminate is for W&B's server; here every run goes to its end", config_path)
    proposals, total = runs(config, count, seed), number_of_runs(config, count)
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
            log.warning("stopped after %d of %s runs; the same command goes on", len(codes), total)
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
        config: the sweep file.
        parameters: the parameters of the run.

    Raises:
        ValueError: if the command of the sweep runs another program.
    """
    return _after_program(words(config, parameters))


def _after_program(line: Sequence[str]) -> list[str]:
    """Return the words after `tokenprune`.

    Raises:
        ValueError: if the command runs something else.
    """
    front = list(itertools.takewhile(lambda word: word != "tokenprune", line))
    if len(front) == len(line) or not set(front) <= {"/usr/bin/env", "python", "python3", "-m"}:
        raise ValueError(
            f"the command {' '.join(line)!r} does not run tokenprune; "
            'write command: ["${env}", "tokenprune", "evaluate", "${args}"]'
        )
    return list(line[len(front) + 1 :])


def _nested(names: Sequence[tuple[str, ...]], values: Sequence[Any]) -> dict[str, Any]:
    """Return values by name; those with a path of several names as dictionaries in dictionaries."""
    found: dict[str, Any] = {}
    for path, value in zip(names, values, strict=True):
        inner = found
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return found


def _grid_values(spec: Mapping[str, Any]) -> list[Any]:
    """Return all values of a parameter of a grid; a quantized one ends before its maximum, as W&B's does."""
    if "value" in spec:
        return [spec["value"]]
    if "values" in spec:
        return list(spec["values"])
    low, high, step = spec["min"], spec["max"], spec.get("q", 1)
    if spec.get("distribution") != "q_uniform":
        return list(range(low, high + 1))
    return [_clean(low + n * step, step) for n in range(math.ceil((high - low) / step))]


def _draw(name: str, spec: Mapping[str, Any], chance: random.Random) -> Any:
    """Draw a value of a parameter."""
    kind = distribution(name, spec)
    if kind == "constant":
        return spec["value"]
    if kind.startswith("categorical"):
        return chance.choices(spec["values"], weights=spec.get("probabilities"))[0]
    if kind == "int_uniform":
        return chance.randint(spec["min"], spec["max"])
    base = kind.removeprefix("q_")
    value = _continuous(base, spec, chance)
    if base == kind:
        return value
    step = spec.get("q", 1)
    return _clean(round(value / step) * step, step)


def _continuous(kind: str, spec: Mapping[str, Any], chance: random.Random) -> float:
    if kind in ("normal", "log_normal"):
        value = chance.gauss(spec.get("mu", 0.0), spec.get("sigma", 1.0))
        return math.exp(value) if kind == "log_normal" else value
    if kind == "beta":
        return chance.betavariate(spec.get("a", 1.0), spec.get("b", 1.0))
    low, high = float(spec["min"]), float(spec["max"])
    if kind == "uniform":
        return chance.uniform(low, high)
    if kind == "inv_log_uniform":  # bounds are those of log(1 / x)
        return math.exp(-chance.uniform(low, high))
    if kind == "log_uniform":
        return math.exp(chance.uniform(low, high))
    value = math.exp(chance.uniform(math.log(low), math.log(high)))  # log_uniform_values and inv_log_uniform_values
    return min(max(value, low), high)


def _clean(value: float, step: float) -> float:
    """Return a multiple of a step without what binary fractions leave behind: 0.3, not 0.30000000000000004."""
    return int(value) if isinstance(step, int) and float(value).is_integer() else float(f"{value:.12g}")


def _bayes(config: Mapping[str, Any], number: int, seed: int) -> Generator[dict[str, Any], float | None, None]:
    """Let W&B's library choose the runs.

    Raises:
        ValueError: if it is not installed, or the sweep names no metric.
    """
    if importlib.util.find_spec("sweeps") is None:
        raise ValueError(NEEDS_SERVER)
    if not (config.get("metric") or {}).get("name"):
        raise ValueError("method: bayes needs a `metric` with name and goal")
    return _bayes_runs(config, number, seed)


def _bayes_runs(config: Mapping[str, Any], number: int, seed: int) -> Generator[dict[str, Any], float | None, None]:
    sweeps = importlib.import_module("sweeps")
    np.random.seed(seed)  # what the library draws from; the same proposals again are what makes a stopped sweep go on
    done: list[Any] = []
    for _ in range(number):
        run = sweeps.next_run(dict(config), done)
        result = yield {name: entry["value"] for name, entry in run.config.items()}
        run.state = sweeps.RunState.failed if result is None else sweeps.RunState.finished
        run.summary_metrics = {} if result is None else {config["metric"]["name"]: result}
        run.history = [run.summary_metrics] if run.summary_metrics else []
        done.append(run)
