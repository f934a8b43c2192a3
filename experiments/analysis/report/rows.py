"""Experiments as rows and columns, and what they are called."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from tokenprune.experiments.analysis.stats import Budget, Cell, budget_order, short

Row: TypeAlias = tuple[str, dict[Budget, Cell]]
"""Name of a row and its experiments by budget."""


def settings(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Return the experiments by model and task, which are never compared with each other.

    Args:
        cells: the experiments.
    """
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.setting, []).append(cell)
    return found


def rows(cells: Sequence[Cell]) -> list[Row]:
    """Return the rows of a table: methods, and every seed of a method for itself; full tokens are no row.

    Args:
        cells: experiments of one setting.
    """
    reduced = [cell for cell in cells if cell.role != "full"]
    seeds: dict[str, set[int]] = {}
    for cell in reduced:
        seeds.setdefault(cell.method, set()).add(cell.seed)
    found: dict[str, dict[Budget, Cell]] = {}
    for cell in reduced:
        name = cell.method
        if len(seeds[name]) > 1 or cell.strategy == "Random":
            name += f", seed {cell.seed}"
        if cell.budget in found.get(name, {}):  # differs in something no factor names
            name += f" ({cell.hash[:6]})"
        found.setdefault(name, {})[cell.budget] = cell
    return list(found.items())


def full_rows(cells: Sequence[Cell]) -> list[tuple[str, Cell]]:
    """Return the experiments with all tokens by name; several are told apart by what differs in their configuration.

    Args:
        cells: experiments of one setting.
    """
    found = [cell for cell in cells if cell.role == "full"]
    keys = [
        key
        for key in ("dtype", "max_new_tokens", "temperature", "batch_size", "seed", "device")
        if len({c.config.get(key) for c in found}) > 1
    ]
    named = [", ".join(f"{key}={short(cell.config.get(key))}" for key in keys) for cell in found]
    return [(f"full tokens, {name}" if name else "full tokens", cell) for name, cell in zip(named, found, strict=True)]


def budgets(cells: Iterable[Cell]) -> list[Budget]:
    """Return the budgets of all but full tokens, least first.

    Args:
        cells: the experiments.
    """
    found = {cell.budget for cell in cells if cell.role != "full"}
    return sorted(found, key=budget_order)


def setting_text(cell: Cell) -> str:
    """Return model and task of an experiment.

    Args:
        cell: an experiment of the setting.
    """
    model, task = (short(json.loads(value)) for value in cell.setting)
    return f"{model}, {task}"


def metric_text(cell: Cell) -> str:
    """Return the metric of an experiment in words.

    Args:
        cell: an experiment.
    """
    return cell.metric.replace("_", " ")
