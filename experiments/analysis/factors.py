"""Effects of the factors of a grid: the levels of a factor at equal values of the remaining factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenprune.experiments.analysis.intervals import Interval, bootstrap_interval
from tokenprune.experiments.analysis.results import Setting, config_key, shorten_value


@dataclass(frozen=True)
class Level:
    """One level of a factor, averaged over all other factors.

    Args:
        name: the level as text.
        score: mean score.
        deficit: paired difference, best level minus this level; `None` for the best level.
    """

    name: str
    score: Interval
    deficit: Interval | None


@dataclass(frozen=True)
class Factor:
    """Scores of the levels of a factor under the same values of all other factors.

    Args:
        name: dotted name of the factor.
        levels: the levels, best first; empty if no combination of the other factors was run at every level.
        n_settings: number of settings in the comparison.
        n_unmatched: number of settings without a matching setting at every other level.
    """

    name: str
    levels: Sequence[Level]
    n_settings: int
    n_unmatched: int

    @property
    def is_separated(self) -> bool:
        """Whether the best level scores higher than every other level."""
        return all(level.deficit is None or not level.deficit.contains_zero for level in self.levels)


def compare_levels(settings: Iterable[Setting], name: str, seed: int = 0) -> Factor:
    """Return the mean score of each level of a factor, averaged over the other factors.

    Only combinations of the other factors that were run at every level count. Of these, only the samples that every
    level has without an error count. Otherwise an unfinished grid would favor the level that ran on easier samples.

    Args:
        settings: the settings; settings outside the grid are ignored.
        name: dotted name of the factor.
        seed: seed of the bootstrap.
    """
    grid = [setting for setting in settings if setting.role == "grid" and name in setting.factors]
    names = {config_key(setting.factors[name]): setting.factors[name] for setting in grid}
    blocks: dict[str, dict[str, Setting]] = {}
    for setting in grid:
        blocks.setdefault(_remaining_factors(setting, name), {}).setdefault(config_key(setting.factors[name]), setting)
    complete = [block for block in blocks.values() if len(block) == len(names)]
    scores: dict[str, list[float]] = {key: [] for key in names}
    groups: list[str] = []
    n_used = 0
    for block in complete:
        first = next(iter(block.values()))
        common = [s for s in first.valid_records if all(s in setting.valid_records for setting in block.values())]
        n_used += len(block) if common else 0
        groups += [f"{first.context[1]} {first.valid_records[sample]['group']}" for sample in common]
        for key, setting in block.items():
            scores[key] += [float(setting.valid_records[sample]["score"]) for sample in common]
    if not groups:
        return Factor(name, (), 0, len(grid))
    means = {key: np.array(numbers) for key, numbers in scores.items()}
    order = sorted(means, key=lambda key: -means[key].mean())
    levels = [
        Level(
            shorten_value(names[key]),
            bootstrap_interval(means[key], groups, seed),
            None if key == order[0] else bootstrap_interval(means[order[0]] - means[key], groups, seed),
        )
        for key in order
    ]
    return Factor(name, levels, n_used, len(grid) - n_used)


def _remaining_factors(setting: Setting, name: str) -> str:
    """Return a key of all values except one factor. Settings with equal keys differ only in that factor."""
    model, task = setting.context
    path = name.split(".")
    remaining = {key: value for key, value in setting.factors.items() if key != name}
    fixed = {"model": model, "task": task, "seed": setting.seed}
    return config_key([remaining, {key: value for key, value in fixed.items() if key not in (path[0], path[-1])}])


def compare_factors(settings: Sequence[Setting], seed: int = 0) -> list[Factor]:
    """Return the level comparison of every factor with more than one level in the grid.

    Args:
        settings: the settings; settings outside the grid are ignored.
        seed: seed of the bootstrap.
    """
    grid = [setting for setting in settings if setting.role == "grid"]
    names = dict.fromkeys(name for setting in grid for name in setting.factors)
    varied = [n for n in names if len({config_key(setting.factors[n]) for setting in grid if n in setting.factors}) > 1]
    return [compare_levels(grid, name, seed) for name in varied]
