"""Every experiment against full tokens, and against random tokens at its budget."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.experiments.analysis.stats import Difference, Setting, compare, corrected, full_of, randoms_of


def against_full(settings: Sequence[Setting]) -> list[tuple[Setting, Difference]]:
    """Return every experiment minus full tokens, corrected over all of them.

    Args:
        settings: experiments of one setting.
    """
    pairs = [(setting, full_of(setting, settings)) for setting in settings if setting.role != "full"]
    found = [(setting, compare(setting, full)) for setting, full in pairs if full is not None]
    fixed = corrected([difference for _, difference in found])
    return [(setting, difference) for (setting, _), difference in zip(found, fixed, strict=True)]


def against_random(settings: Sequence[Setting]) -> list[tuple[Setting, int, Difference]]:
    """Return every experiment minus each seed of random tokens at its budget, corrected over all of them.

    Args:
        settings: experiments of one setting.
    """
    chosen = [setting for setting in settings if setting.role != "full" and setting.strategy != "Random"]
    found = [
        (setting, seed, compare(setting, other))
        for setting in chosen
        for seed, other in randoms_of(setting, settings).items()
    ]
    fixed = corrected([difference for *_, difference in found])
    return [(setting, seed, difference) for (setting, seed, _), difference in zip(found, fixed, strict=True)]
