"""The parameters of each run of a sweep: grid order, random draws, or proposals of W&B's library."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tokenprune.experiments.tracking.sweep_file import list_parameters, resolve_distribution, validate_sweep

NEEDS_SERVER = (
    "method: bayes chooses each run from the results of earlier runs; create the sweep at W&B (wandb sweep FILE, then "
    "wandb agent ID), or install W&B's library in a separate environment (pip install sweeps; it requires numpy < 2)"
)


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
