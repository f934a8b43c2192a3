"""Arranges settings in table rows and columns, and names the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from tokenprune.experiments.analysis.results import (
    Budget,
    Setting,
    budget_sort_key,
    is_random_strategy,
    shorten_value,
)

Row: TypeAlias = tuple[str, dict[Budget, Setting]]
"""Name of a table row and its settings by budget."""
ACRONYMS = {"anls", "f1", "mme", "vqa"}
"""Words in names of metrics that are written in capitals."""


def group_by_context(settings: Sequence[Setting]) -> dict[tuple[str, str], list[Setting]]:
    """Return the settings by context (model and task). Settings of different contexts are never compared.

    Args:
        settings: the settings.
    """
    by_context: dict[tuple[str, str], list[Setting]] = {}
    for setting in settings:
        by_context.setdefault(setting.context, []).append(setting)
    return by_context


def method_rows(settings: Sequence[Setting]) -> list[Row]:
    """Return one table row per method and seed, without the settings with full tokens.

    Args:
        settings: the settings of one context.
    """
    reduced = [setting for setting in settings if setting.role != "full"]
    seeds: dict[str, set[int]] = {}
    for setting in reduced:
        seeds.setdefault(setting.method, set()).add(setting.seed)
    named_rows: dict[str, dict[Budget, Setting]] = {}
    for setting in reduced:
        name = setting.method
        if len(seeds[name]) > 1 or is_random_strategy(setting.strategy):
            name += f", seed {setting.seed}"
        if setting.budget in named_rows.get(name, {}):  # differs in an option that is no factor
            name += f" ({setting.hash[:6]})"
        named_rows.setdefault(name, {})[setting.budget] = setting
    return list(named_rows.items())


def full_rows(settings: Sequence[Setting]) -> list[tuple[str, Setting]]:
    """Return (row name, setting) of each setting with all tokens.

    With several such settings, the row names list the configuration values that differ.

    Args:
        settings: the settings of one context.
    """
    full = [setting for setting in settings if setting.role == "full"]
    keys = [
        key
        for key in ("dtype", "max_new_tokens", "temperature", "batch_size", "seed", "device")
        if len({setting.config.get(key) for setting in full}) > 1
    ]
    suffixes = [", ".join(f"{key}={shorten_value(setting.config.get(key))}" for key in keys) for setting in full]
    return [
        (f"full tokens, {suffix}" if suffix else "full tokens", setting)
        for suffix, setting in zip(suffixes, full, strict=True)
    ]


def list_budgets(settings: Iterable[Setting]) -> list[Budget]:
    """Return the sorted budgets of all settings without full tokens.

    Args:
        settings: the settings.
    """
    budgets = {setting.budget for setting in settings if setting.role != "full"}
    return sorted(budgets, key=budget_sort_key)


def format_context(setting: Setting) -> str:
    """Return model and task of a setting as text.

    Args:
        setting: the setting.
    """
    model, task = (shorten_value(json.loads(value)) for value in setting.context)
    return f"{model}, {task}"


def format_metric(setting: Setting) -> str:
    """Return the metric of a setting as text, such as ``"exact match"`` and ``"ANLS"``.

    Args:
        setting: the setting.
    """
    return " ".join(word.upper() if word in ACRONYMS else word for word in setting.metric.split("_"))
