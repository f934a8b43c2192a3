"""Runs W&B sweep files on this machine without an account, with the same YAML and the same command lines.

`method: grid` and `method: random` are implemented here. Bayesian search requires W&B's server or its open library
`sweeps`. `format_arguments` returns the same arguments that the agent passes for the macro `${args}`, so that one sweep
file works in both places.
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
"""Default command of W&B."""
NEEDS_SERVER = (
    "method: bayes chooses each run from the results of earlier runs; create the sweep at W&B (wandb sweep FILE, then "
    "wandb agent ID), or install W&B's library in a separate environment (pip install sweeps; it requires numpy < 2)"
)
BOUNDED = frozenset({"uniform", "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values"})
"""Distributions between min and max. With the suffix `_values` the bounds are values, without it exponents of e."""
QUANTIZED = frozenset({"uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta"})
"""Distributions with a variant that is rounded to multiples of q: `q_uniform`, ..."""


def read_sweep(path: str | Path) -> dict[str, Any]:
    """Read a sweep file and return its validated configuration.

    Args:
        path: YAML file in W&B's format.

    Raises:
        ValueError: if the file cannot be read or the sweep is invalid.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    try:
        return validate_sweep(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def validate_sweep(config: Any) -> dict[str, Any]:
    """Validate a sweep configuration and return it unchanged.

    Args:
        config: content of a sweep file.

    Raises:
        ValueError: if a key is missing or invalid.
    """
    if not isinstance(config, dict) or not isinstance(config.get("parameters"), dict) or not config["parameters"]:
        raise ValueError("expected a sweep: a mapping with `method` and `parameters`")
    if config.get("method") not in ("grid", "random", "bayes"):
        raise ValueError(f"method: {config.get('method')!r} is unknown; use grid, random or bayes")
    cap = config.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise ValueError(f"run_cap: expected a positive integer, got {cap!r}")
    for path, spec in list_parameters(config["parameters"]):
        name, kind = ".".join(path), resolve_distribution(".".join(path), spec)
        if config["method"] == "grid" and kind not in ("constant", "categorical", "int_uniform", "q_uniform"):
            raise ValueError(f"{name}: a grid does not support the distribution {kind}; list its `values`")
        for value in _scalars([spec.get("value", ""), spec.get("values", "")]):
            if isinstance(value, float) and value.is_integer():
                # According to W&B's library `sweeps`, the server returns 3000000 for 3000000.0.
                log.warning(
                    "%s: W&B's server may pass %s as %d; a budget of 1 is one token, write 100%% for all tokens",
                    *(name, value, value),
                )
            elif value is None:
                log.warning("%s: W&B passes null as the word None; omit the parameter instead", name)
    return config


def _scalars(value: Any) -> Iterator[Any]:
    """Yield the scalar values of nested lists and dictionaries."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _scalars(item)
    else:
        yield value


def list_parameters(
    parameters: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Return path and specification of every parameter, sorted by name as in W&B.

    Args:
        parameters: specifications by name; nested `parameters` become nested dictionaries.
        prefix: path of the parent parameter.

    Raises:
        ValueError: if a parameter has no specification.
    """
    parameter_specs: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for name in sorted(parameters, key=str):
        spec, path = parameters[name], (*prefix, str(name))
        if not isinstance(spec, dict):
            raise ValueError(f"{'.'.join(path)}: write `value: {spec}` or `values: [...]`")
        if isinstance(spec.get("parameters"), dict) and set(spec) == {"parameters"}:
            parameter_specs += list_parameters(spec["parameters"], path)
        else:
            parameter_specs.append((path, spec))
    return parameter_specs


def resolve_distribution(name: str, spec: Mapping[str, Any]) -> str:
    """Return the distribution of a parameter: the specified one, or W&B's default for its keys.

    Args:
        name: name of the parameter.
        spec: specification of the parameter.

    Raises:
        ValueError: if keys are missing or unexpected, or if `min` is above `max`.
    """
    bounds = [spec.get("min"), spec.get("max")]
    is_integer = all(isinstance(bound, int) for bound in bounds)
    kind = spec.get("distribution") or (
        "constant"
        if "value" in spec
        else "categorical"
        if "values" in spec
        else "int_uniform"
        if is_integer
        else "uniform"
    )
    base = kind.removeprefix("q_") if kind.startswith("q_") and kind.removeprefix("q_") in QUANTIZED else kind
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
        raise ValueError(f"{name}: unknown distribution {kind!r}")
    if missing := needed - set(spec):
        raise ValueError(f"{name}: {', '.join(sorted(missing))} is missing; give value, values, or min and max")
    if unexpected := set(spec) - needed - optional - {"distribution"}:
        raise ValueError(f"{name}: {', '.join(sorted(unexpected))} is not allowed for the distribution {kind}")
    if "values" in spec and (not isinstance(spec["values"], list) or not spec["values"]):
        raise ValueError(f"{name}: expected a non-empty list of values")
    if "probabilities" in spec and len(spec["probabilities"]) != len(spec["values"]):
        raise ValueError(f"{name}: expected one probability for each of the {len(spec['values'])} values")
    if needed == {"min", "max"} and not spec["min"] <= spec["max"]:
        raise ValueError(f"{name}: min {spec['min']} is above max {spec['max']}")
    return str(kind)


def count_runs(config: Mapping[str, Any], count: int | None = None) -> int | None:
    """Return the number of runs of a sweep, or None if it is unlimited.

    Args:
        config: the sweep configuration.
        count: maximum number of runs.
    """
    limits = [limit for limit in (count, config.get("run_cap")) if limit is not None]
    if config["method"] == "grid":
        limits.append(math.prod(len(_grid_values(spec)) for _, spec in list_parameters(config["parameters"])))
    return min(limits, default=None)


def generate_runs(config: Mapping[str, Any], count: int | None = None, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Return an iterator over the parameters of each run.

    A grid has W&B's order: parameters sorted by name, the last parameter varies fastest. For one seed, the first n
    random draws do not depend on the count. For `bayes`, send the metric of each run to the iterator, or None if the
    run failed.

    Args:
        config: the sweep configuration.
        count: maximum number of runs; a random search requires it or `run_cap`.
        seed: seed of a random or Bayesian search.

    Raises:
        ValueError: if the sweep cannot be run here.
    """
    validate_sweep(config)
    number = count_runs(config, count)
    if number is None:
        raise ValueError(f"method: {config['method']} is unlimited; give a count, or `run_cap` in the file")
    if config["method"] == "bayes":
        return _bayes(config, number, seed)
    parameters = list_parameters(config["parameters"])
    if config["method"] == "grid":
        draws: Iterator[Sequence[Any]] = itertools.product(*(_grid_values(spec) for _, spec in parameters))
    else:
        generator = random.Random(seed)
        draws = ([_draw(path[-1], spec, generator) for path, spec in parameters] for _ in itertools.count())
    paths = [path for path, _ in parameters]
    return (_nest(paths, values) for values in itertools.islice(draws, number))


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


def _nest(paths: Sequence[tuple[str, ...]], values: Sequence[Any]) -> dict[str, Any]:
    """Return values by name; a path of several names becomes nested dictionaries."""
    parameters: dict[str, Any] = {}
    for path, value in zip(paths, values, strict=True):
        parent = parameters
        for name in path[:-1]:
            parent = parent.setdefault(name, {})
        parent[path[-1]] = value
    return parameters


def _grid_values(spec: Mapping[str, Any]) -> list[Any]:
    """Return all values of a grid parameter. A quantized range excludes its maximum, as in W&B."""
    if "value" in spec:
        return [spec["value"]]
    if "values" in spec:
        return list(spec["values"])
    low, high, step = spec["min"], spec["max"], spec.get("q", 1)
    if spec.get("distribution") != "q_uniform":
        return list(range(low, high + 1))
    return [_round_to_step(low + n * step, step) for n in range(math.ceil((high - low) / step))]


def _draw(name: str, spec: Mapping[str, Any], generator: random.Random) -> Any:
    """Return a random value of a parameter."""
    kind = resolve_distribution(name, spec)
    if kind == "constant":
        return spec["value"]
    if kind.startswith("categorical"):
        return generator.choices(spec["values"], weights=spec.get("probabilities"))[0]
    if kind == "int_uniform":
        return generator.randint(spec["min"], spec["max"])
    base = kind.removeprefix("q_")
    value = _draw_continuous(base, spec, generator)
    if base == kind:
        return value
    step = spec.get("q", 1)
    return _round_to_step(round(value / step) * step, step)


def _draw_continuous(kind: str, spec: Mapping[str, Any], generator: random.Random) -> float:
    if kind in ("normal", "log_normal"):
        value = generator.gauss(spec.get("mu", 0.0), spec.get("sigma", 1.0))
        return math.exp(value) if kind == "log_normal" else value
    if kind == "beta":
        return generator.betavariate(spec.get("a", 1.0), spec.get("b", 1.0))
    low, high = float(spec["min"]), float(spec["max"])
    if kind == "uniform":
        return generator.uniform(low, high)
    if kind == "inv_log_uniform":  # the bounds limit log(1 / x)
        return math.exp(-generator.uniform(low, high))
    if kind == "log_uniform":
        return math.exp(generator.uniform(low, high))
    value = math.exp(generator.uniform(math.log(low), math.log(high)))  # log_uniform_values and inv_log_uniform_values
    return min(max(value, low), high)


def _round_to_step(value: float, step: float) -> float:
    """Return a multiple of a step without binary rounding errors: 0.3, not 0.30000000000000004."""
    return int(value) if isinstance(step, int) and float(value).is_integer() else float(f"{value:.12g}")


def _bayes(config: Mapping[str, Any], number: int, seed: int) -> Generator[dict[str, Any], float | None, None]:
    """Return a generator of runs that W&B's library `sweeps` chooses.

    Raises:
        ValueError: if the library is not installed, or the sweep names no metric.
    """
    if importlib.util.find_spec("sweeps") is None:
        raise ValueError(NEEDS_SERVER)
    if not (config.get("metric") or {}).get("name"):
        raise ValueError("method: bayes requires a `metric` with name and goal")
    return _bayes_runs(config, number, seed)


def _bayes_runs(config: Mapping[str, Any], number: int, seed: int) -> Generator[dict[str, Any], float | None, None]:
    sweeps = importlib.import_module("sweeps")
    np.random.seed(seed)  # the library uses this generator; equal proposals allow a stopped sweep to resume
    finished_runs: list[Any] = []
    for _ in range(number):
        run = sweeps.next_run(dict(config), finished_runs)
        result = yield {name: entry["value"] for name, entry in run.config.items()}
        run.state = sweeps.RunState.failed if result is None else sweeps.RunState.finished
        run.summary_metrics = {} if result is None else {config["metric"]["name"]: result}
        run.history = [run.summary_metrics] if run.summary_metrics else []
        finished_runs.append(run)
