"""Experiments as rows and columns, and what they are called."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from tokenprune.experiments.analysis.stats import Budget, Setting, budget_order, short

Row: TypeAlias = tuple[str, dict[Budget, Setting]]
"""Name of a row and its experiments by budget."""


def contexts(settings: Sequence[Setting]) -> dict[tuple[str, str], list[Setting]]:
    """Return the experiments by model and task, which are never compared with each other.

    Args:
        settings: the experiments.
    """
    found: dict[tuple[str, str], list[Setting]] = {}
    for setting in settings:
        found.setdefault(setting.context, []).append(setting)
    return found


def rows(settings: Sequence[Setting]) -> list[Row]:
    """Return the rows of a table: methods, and every seed of a method for itself; full tokens are no row.

    Args:
        settings: experiments of one setting.
    """
    reduced = [setting for setting in settings if setting.role != "full"]
    seeds: dict[str, set[int]] = {}
    for setting in reduced:
        seeds.setdefault(setting.method, set()).add(setting.seed)
    found: dict[str, dict[Budget, Setting]] = {}
    for setting in reduced:
        name = setting.method
        if len(seeds[name]) > 1 or setting.strategy == "Random":
            name += f", seed {setting.seed}"
        if setting.budget in found.get(name, {}):  # differs in something no factor names
            name += f" ({setting.hash[:6]})"
        found.setdefault(name, {})[setting.budget] = setting
    return list(found.items())


def full_rows(settings: Sequence[Setting]) -> list[tuple[str, Setting]]:
    """Return the experiments with all tokens by name; several are told apart by what differs in their configuration.

    Args:
        settings: experiments of one setting.
    """
    found = [setting for setting in settings if setting.role == "full"]
    keys = [
        key
        for key in ("dtype", "max_new_tokens", "temperature", "batch_size", "seed", "device")
        if len({c.config.get(key) for c in found}) > 1
    ]
    named = [", ".join(f"{key}={short(setting.config.get(key))}" for key in keys) for setting in found]
    return [
        (f"full tokens, {name}" if name else "full tokens", setting) for name, setting in zip(named, found, strict=True)
    ]


def budgets(settings: Iterable[Setting]) -> list[Budget]:
    """Return the budgets of all but full tokens, least first.

    Args:
        settings: the experiments.
    """
    found = {setting.budget for setting in settings if setting.role != "full"}
    return sorted(found, key=budget_order)


def context_text(setting: Setting) -> str:
    """Return model and task of an experiment.

    Args:
        setting: an experiment of the setting.
    """
    model, task = (short(json.loads(value)) for value in setting.context)
    return f"{model}, {task}"


def metric_text(setting: Setting) -> str:
    """Return the metric of an experiment in words.

    Args:
        setting: an experiment.
    """
    return setting.metric.replace("_", " ")
