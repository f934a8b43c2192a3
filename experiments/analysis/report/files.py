"""Files for other programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenprune.experiments.analysis.report.comparisons import against_full, against_random
from tokenprune.experiments.analysis.report.rows import contexts
from tokenprune.experiments.analysis.stats import Difference, Setting, short


def setting_rows(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Return one row an experiment, with its differences to full tokens and to every random seed that is there.

    Args:
        settings: the experiments.
    """
    full: dict[str, Difference] = {}
    random: dict[tuple[str, int], Difference] = {}
    for part in contexts(settings).values():
        full |= {setting.hash: difference for setting, difference in against_full(part)}
        random |= {(setting.hash, seed): difference for setting, seed, difference in against_random(part)}
    found = []
    for setting in settings:
        row: dict[str, Any] = {
            "hash": setting.hash,
            "name": setting.name,
            "method": setting.method,
            "strategy": setting.strategy,
            "budget": setting.budget,
            "role": setting.role,
            "seed": setting.seed,
            "model": short(json.loads(setting.context[0])),
            "task": short(json.loads(setting.context[1])),
            "metric": setting.metric,
            "n": setting.score.n,
            "n_errors": setting.n_errors,
            "groups": setting.score.groups,
            "mean": setting.score.mean,
            "low": setting.score.low,
            "high": setting.score.high,
        }
        row |= {name: setting.mean(name) for name in ("asked", "kept", "prompt_length", "prompt_length_full")}
        row |= {f"{name}_median": setting.median(name) for name in ("encode_ms", "select_ms", "generate_ms")}
        if full:
            row |= _difference_row("minus_full", full.get(setting.hash))
        for seed in sorted({seed for _, seed in random}):
            row |= _difference_row(f"minus_random_{seed}", random.get((setting.hash, seed)))
        row |= {f"factor.{name}": short(value) for name, value in setting.factors.items()}
        found.append(row)
    return found


def _difference_row(name: str, difference: Difference | None) -> dict[str, Any]:
    parts = ("", "_low", "_high", "_n", "_mcnemar_p", "_holm_p", "_verdict")
    if difference is None:
        return {f"{name}{part}": None for part in parts}
    s, d = difference.score, difference
    values = (s.mean, s.low, s.high, s.n, d.p, d.holm, d.verdict)
    return {f"{name}{part}": value for part, value in zip(parts, values, strict=True)}


def record_rows(settings: Iterable[Setting]) -> list[dict[str, Any]]:
    """Return one row a record, with what identifies its experiment; lists are written as JSON.

    Args:
        settings: the experiments.
    """
    found = []
    for setting in settings:
        head = {
            "hash": setting.hash,
            "method": setting.method,
            "budget": setting.budget,
            "role": setting.role,
            "seed": setting.seed,
        }
        for record in setting.records:
            plain = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in record.items()}
            found.append(head | plain)
    return found


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; what is not known stays empty.

    Args:
        path: the file.
        lines: the rows; they need not have the same names.
    """
    names = dict.fromkeys(name for line in lines for name in line)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names), restval="")
        writer.writeheader()
        writer.writerows({name: "" if _unknown(value) else value for name, value in line.items()} for line in lines)


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def need_pyarrow() -> tuple[Any, Any]:
    """Return pyarrow and its module for Parquet.

    Raises:
        ImportError: without pyarrow; it says what to do.
    """
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow: `pip install tokenprune[parquet]`; the CSV files hold the same rows"
        ) from error


def write_parquet(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as Parquet; a column that mixes words with numbers becomes text.

    Args:
        path: the file.
        lines: the rows; they need not have the same names.

    Raises:
        ImportError: without pyarrow.
    """
    pyarrow, parquet = need_pyarrow()
    names = dict.fromkeys(name for line in lines for name in line)
    columns = {name: _one_type([line.get(name) for line in lines]) for name in names}
    parquet.write_table(pyarrow.table(columns), str(path))


def _one_type(values: list[Any]) -> list[Any]:
    """Return a column that Parquet can hold: text if it mixes words with numbers, as budgets and answers may."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) < 2:
        return values
    return [value if value is None or isinstance(value, str) else str(value) for value in values]
