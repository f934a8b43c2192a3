"""Sweep files of W&B: reading, validation, and the distribution of each parameter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

log = logging.getLogger(__name__)

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
