"""Comparisons of every setting with full tokens, and with random tokens at the same budget."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.experiments.analysis.differences import Difference, compare, correct_differences
from tokenprune.experiments.analysis.results import (
    Setting,
    find_full_setting,
    find_random_settings,
    is_random_strategy,
)


def compare_with_full(settings: Sequence[Setting]) -> list[tuple[Setting, Difference]]:
    """Return every setting minus full tokens, with Holm's correction over all of them.

    Args:
        settings: the settings of one context.
    """
    pairs = [(setting, find_full_setting(setting, settings)) for setting in settings if setting.role != "full"]
    compared = [(setting, compare(setting, full)) for setting, full in pairs if full is not None]
    corrected = correct_differences([difference for _, difference in compared])
    return [(setting, difference) for (setting, _), difference in zip(compared, corrected, strict=True)]


def compare_with_random(settings: Sequence[Setting]) -> list[tuple[Setting, int, Difference]]:
    """Return every setting minus each seed of random tokens at its budget, with Holm's correction over all of them.

    Args:
        settings: the settings of one context.
    """
    compared = [
        (setting, seed, compare(setting, random))
        for setting in settings
        if setting.role != "full" and not is_random_strategy(setting.strategy)
        for seed, random in find_random_settings(setting, settings).items()
    ]
    corrected = correct_differences([difference for *_, difference in compared])
    return [(setting, seed, difference) for (setting, seed, _), difference in zip(compared, corrected, strict=True)]
