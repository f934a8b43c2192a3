"""CSV and Parquet files of settings and records, for other programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenprune.experiments.analysis.differences import Difference
from tokenprune.experiments.analysis.report.comparisons import compare_with_full, compare_with_random
from tokenprune.experiments.analysis.report.rows import group_by_context
from tokenprune.experiments.analysis.results import Setting, shorten_value


def setting_rows(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Return one row per setting, with its differences to full tokens and to every available random seed.

    Args:
        settings: the settings.
    """
    full: dict[str, Difference] = {}
    random: dict[tuple[str, int], Difference] = {}
    for members in group_by_context(settings).values():
        full |= {setting.hash: difference for setting, difference in compare_with_full(members)}
        random |= {(setting.hash, seed): difference for setting, seed, difference in compare_with_random(members)}
    lines = []
    for setting in settings:
        row: dict[str, Any] = {
            "hash": setting.hash,
            "name": setting.name,
            "method": setting.method,
            "strategy": setting.method if setting.role == "full" else setting.strategy,
            "budget": setting.budget,
            "role": setting.role,
            "seed": setting.seed,
            "model": shorten_value(json.loads(setting.context[0])),
            "task": shorten_value(json.loads(setting.context[1])),
            "metric": setting.metric,
            "n": setting.score.n,
            "n_errors": setting.n_errors,
            "groups": setting.score.groups,
            "mean": setting.score.mean,
            "low": setting.score.low,
            "high": setting.score.high,
        }
        row |= {name: setting.mean(name) for name in ("asked", "kept", "prompt_length", "prompt_length_full")}
        row |= {"average_tokens": setting.average_tokens, "flops_share": setting.flops_share}
        row |= {name: getattr(setting, name) for name in ("tower_patches_share", "tower_flops_share")}
        row |= {
            f"{name}_median": setting.median(name)
            for name in ("prepare_alone_ms", "encode_ms", "select_ms", "generate_ms")
        }
        row["time_alone"] = setting.time_alone
        row["evidence_coverage"] = setting.evidence_coverage.mean
        if full:
            row |= _difference_row("minus_full", full.get(setting.hash))
        for seed in sorted({seed for _, seed in random}):
            row |= _difference_row(f"minus_random_{seed}", random.get((setting.hash, seed)))
        row |= {f"factor.{name}": shorten_value(value) for name, value in setting.factors.items()}
        lines.append(row)
    return lines


def _difference_row(name: str, difference: Difference | None) -> dict[str, Any]:
    suffixes = ("", "_low", "_high", "_n", "_mcnemar_p", "_holm_p", "_verdict")
    if difference is None:
        return {f"{name}{suffix}": None for suffix in suffixes}
    score = difference.score
    values = (score.mean, score.low, score.high, score.n, difference.p, difference.holm, difference.verdict)
    return {f"{name}{suffix}": value for suffix, value in zip(suffixes, values, strict=True)}


def record_rows(settings: Iterable[Setting]) -> list[dict[str, Any]]:
    """Return one row per record, with the fields that identify its setting; lists and objects become JSON text.

    Args:
        settings: the settings.
    """
    lines = []
    for setting in settings:
        head = {
            "hash": setting.hash,
            "method": setting.method,
            "budget": setting.budget,
            "role": setting.role,
            "seed": setting.seed,
        }
        for record in setting.records:
            flat = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in record.items()}
            lines.append(head | flat)
    return lines


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; `None`, NaN and missing values become empty fields.

    Args:
        path: path of the file.
        lines: the rows; their names may differ.
    """
    names = dict.fromkeys(name for line in lines for name in line)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names), restval="")
        writer.writeheader()
        writer.writerows({name: "" if _is_missing(value) else value for name, value in line.items()} for line in lines)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def import_pyarrow() -> tuple[Any, Any]:
    """Import and return `pyarrow` and `pyarrow.parquet`.

    Raises:
        ImportError: if pyarrow is not installed; the message names the command that installs it.
    """
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow: `pip install tokenprune[parquet]`; the CSV files hold the same rows"
        ) from error


def write_parquet(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as Parquet; a column that mixes text and numbers becomes text.

    Args:
        path: path of the file.
        lines: the rows; their names may differ.

    Raises:
        ImportError: if pyarrow is not installed.
    """
    pyarrow, parquet = import_pyarrow()
    names = dict.fromkeys(name for line in lines for name in line)
    columns = {name: _unify_types([line.get(name) for line in lines]) for name in names}
    parquet.write_table(pyarrow.table(columns), str(path))


def _unify_types(values: list[Any]) -> list[Any]:
    """Return a column of one type for Parquet: text if it mixes text and numbers, as budgets and answers can."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) < 2:
        return values
    return [value if value is None or isinstance(value, str) else str(value) for value in values]
