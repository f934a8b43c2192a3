"""Intervals, paired differences and factor effects from the records of a run directory.

Samples about one image are not independent. Every interval therefore comes from a bootstrap over groups; a group holds
the samples of one image. Two settings are compared sample by sample. ``docs/explanation/statistics.md`` gives the
reasons.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.stats import binomtest

from tokenprune.experiments.evaluation.records import list_record_files

Record: TypeAlias = Mapping[str, Any]
Budget: TypeAlias = float | str | None
Values: TypeAlias = NDArray[np.float64]

DRAWS = 2000
"""Bootstrap samples of an interval."""
CHUNK = 2_000_000
"""Random numbers drawn per step of the bootstrap; limits the memory for many groups."""
LAYOUT = "a folder with settings/<hash>/setting.json and settings/<hash>/records.jsonl, as `tokenprune ablate` writes"
"""Layout of a run directory, for error messages."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Args:
        mean: mean over samples; NaN without samples.
        low: lower end; NaN with fewer than two groups, because one group has no spread.
        high: upper end; NaN with fewer than two groups.
        n: number of samples.
        groups: number of groups of these samples.
    """

    mean: float
    low: float
    high: float
    n: int
    groups: int

    @property
    def has_bounds(self) -> bool:
        """Whether the interval has ends, which requires at least two groups."""
        return not math.isnan(self.low)

    @property
    def contains_zero(self) -> bool:
        """Whether zero lies in the interval; also true if the interval has no ends."""
        return not self.has_bounds or self.low <= 0 <= self.high


@dataclass(frozen=True)
class Difference:
    """First setting minus second setting on their common samples without an error.

    Args:
        score: mean difference of the scores.
        only_first: number of samples that only the first setting answers correctly.
        only_second: number of samples that only the second setting answers correctly.
        p: McNemar's exact p-value.
        unpaired: number of samples that only one of the two settings has without an error.
        holm: p-value after Holm's correction over a table; `None` without a correction.
    """

    score: Interval
    only_first: int
    only_second: int
    p: float
    unpaired: int
    holm: float | None = None

    @property
    def verdict(self) -> str:
        """The conclusion from the interval as a short phrase."""
        if not self.score.n:
            return "no sample in common"
        if not self.score.has_bounds:
            return "no interval: one group"
        if self.score.contains_zero:
            return "no difference seen"
        direction = "higher" if self.score.mean > 0 else "lower"
        return direction if self.holm is None or self.holm < 0.05 else f"{direction}, alone but not after Holm"


@dataclass(frozen=True, eq=False)
class Setting:
    """One configuration (model, reducer, task and seed) with its records.

    Args:
        hash: name of its folder.
        name: its full name.
        strategy: name of the strategy.
        budget: a `float` is a ratio, an `int` a count, and a `str` a description; `None` if the strategy has no budget.
        role: ``grid``, ``full`` or ``baseline``.
        seed: seed of the setting.
        metric: name of the score.
        factors: values set by the grid, by dotted name.
        config: the resolved configuration.
        environment: versions and device.
        records: one record per sample, including records with an error.
        is_truncated: whether the last line of the records was incomplete and therefore skipped.
    """

    hash: str
    name: str
    strategy: str
    budget: Budget
    role: str = "grid"
    seed: int = 0
    metric: str = "accuracy"
    factors: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Record] = ()
    is_truncated: bool = False

    @property
    def method(self) -> str:
        """The strategy with all values set by the grid except budget, seed, model and task."""
        if self.role == "full":
            return "full tokens"
        name, parts = self.strategy, []
        for key, value in self.factors.items():
            path = key.split(".")
            if path[0] in ("model", "task") or path[-1] == "seed" or "budget" in path:
                continue
            text = shorten_value(value)
            if key == "reducer" and text.startswith(self.strategy):
                name = text  # each level is a complete reducer, so its arguments distinguish the levels
            elif text != self.strategy:
                parts.append(f"{key.removeprefix('reducer.')}={text}")
        return ", ".join([name, *parts])

    @property
    def context(self) -> tuple[str, str]:
        """Model and task as JSON. Two settings are comparable only if they share both."""
        return _key(self.config.get("model")), _key(self.config.get("task"))

    @cached_property
    def valid_records(self) -> Mapping[str, Record]:
        """Records without an error, by sample id."""
        return {str(record["sample"]): record for record in self.records if record.get("error") is None}

    @property
    def n_errors(self) -> int:
        """Number of records with an error."""
        return len(self.records) - len(self.valid_records)

    @cached_property
    def score(self) -> Interval:
        """Mean score over the samples without an error."""
        return mean_score(self.valid_records.values())

    def mean(self, name: str) -> float:
        """Return the mean of a numeric record field over the samples without an error.

        Args:
            name: the record field.
        """
        return float(np.mean(self._numbers(name))) if self.valid_records else math.nan

    def median(self, *names: str) -> float:
        """Return the median over the samples without an error of a sum of numeric record fields.

        Args:
            names: the record fields to sum.
        """
        return float(np.median(sum(self._numbers(name) for name in names))) if self.valid_records else math.nan

    def _numbers(self, name: str) -> Values:
        numbers = (record.get(name) for record in self.valid_records.values())
        return np.array([math.nan if number is None else number for number in numbers], dtype=float)


@dataclass(frozen=True)
class Results:
    """The settings of a run directory.

    Args:
        name: name of the directory.
        settings: the settings with their records.
        notes: remarks about skipped settings and incomplete records.
        directory: path of the run directory.
    """

    name: str
    settings: Sequence[Setting]
    notes: Sequence[str] = ()
    directory: Path | None = None


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


def shorten_value(value: Any) -> str:
    """Return a configuration value as short text: classes without module, absolute paths as their last two parts.

    Args:
        value: any YAML value.
    """
    if isinstance(value, Mapping):
        if "class_path" not in value:
            return ", ".join(f"{key}={shorten_value(entry)}" for key, entry in value.items())
        arguments = shorten_value(value.get("init_args") or {})
        return shorten_value(value["class_path"]) + (f"({arguments})" if arguments else "")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shorten_value, value))}]"
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    if text.startswith("/"):
        text = "/".join(Path(text).parts[-2:])
    return re.sub(r"^(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


def budget_sort_key(budget: Budget) -> tuple[int, float, str]:
    """Return the sort key of a budget: ratios first, then counts, then descriptions, then no budget.

    Args:
        budget: the budget.
    """
    if budget is None:
        return 3, 0.0, ""
    return (2, 0.0, budget) if isinstance(budget, str) else (int(isinstance(budget, int)), budget, "")


# --- reading ----------------------------------------------------------------------------------------------------------


def read_results(directory: Path) -> Results:
    """Read a run directory and return its settings in a fixed order.

    Args:
        directory: the run directory.

    Raises:
        ValueError: if the directory is no run directory, holds no record, or holds an invalid or duplicate record.
    """
    if not (directory / "settings").is_dir():
        hint = " (this is one setting: give the folder two levels up)" if (directory / "setting.json").is_file() else ""
        state = "has no folder settings/" if directory.is_dir() else "does not exist"
        raise ValueError(f"{directory} {state}{hint}; expected {LAYOUT}. Run one of them with this folder first.")
    settings, notes = [], []
    for folder in sorted(path for path in (directory / "settings").iterdir() if path.is_dir()):
        if not (folder / "setting.json").is_file() or not list_record_files(folder):
            notes.append(f"settings/{folder.name} has no setting.json or no records.jsonl and was skipped.")
            continue
        setting = _read_setting(folder)
        if setting.is_truncated:
            notes.append(f"{setting.name} ({setting.hash}): the last line of its records is cut off and was skipped.")
        if setting.records:
            settings.append(setting)
        else:
            notes.append(f"{setting.name} ({setting.hash}) has no record yet and was skipped.")
    if not settings:
        raise ValueError(
            f"{directory} holds no record; expected {LAYOUT}. Run one of them to the end, or a little longer."
        )
    return Results(directory.resolve().name, _sort_settings(settings), notes, directory)


def read_records(path: Path) -> tuple[list[Record], bool]:
    """Return the records of a file, and whether its last line is incomplete and was skipped.

    A process that is killed while it writes leaves such a line.

    Args:
        path: a file with one JSON object per line.

    Raises:
        ValueError: if any other line is invalid, or a sample occurs twice.
    """
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records: list[Record] = []
    line_by_sample: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        location = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:  # invalid JSON, or an incomplete UTF-8 character
            if number == len(lines):
                return records, True
            raise ValueError(f"{location}: not a JSON object ({error}); only the last line may be cut off") from error
        _check_record(record, location)
        sample = str(record["sample"])
        if sample in line_by_sample:
            raise ValueError(
                f"{location}: sample {sample!r} is already in line {line_by_sample[sample]}; "
                "delete one of the two lines, or delete the file and run the setting again"
            )
        line_by_sample[sample] = number
        records.append(record)
    return records, False


def _read_all_records(folder: Path) -> tuple[list[Record], bool]:
    """Return the records of all files of a setting, each sample once, and whether a last line is incomplete."""
    by_sample: dict[str, tuple[Record, Path]] = {}
    is_truncated = False
    for path in list_record_files(folder):
        records, is_cut = read_records(path)
        is_truncated |= is_cut
        for record in records:
            # A process that is killed between merging files and deleting them leaves identical records in two files.
            first, first_path = by_sample.setdefault(str(record["sample"]), (record, path))
            if first != record:
                raise ValueError(
                    f"{path}: sample {record['sample']!r} is already in {first_path.name} with a different record; "
                    "delete one of the two lines"
                )
    return [record for record, _ in by_sample.values()], is_truncated


def _check_record(record: Any, location: str) -> None:
    """Raise an error for a record that the statistics cannot use."""
    if not isinstance(record, dict):
        raise ValueError(f"{location}: expected a JSON object, got {type(record).__name__}")
    missing = [name for name in ("sample", "group", "score", "correct") if name not in record]
    if missing:
        raise ValueError(f"{location}: the record lacks {', '.join(missing)}")
    score = record["score"]
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"{location}: expected a score from 0 to 1, got {score!r}")


def _read_setting(folder: Path) -> Setting:
    path = folder / "setting.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        name, strategy, budget = metadata["name"], metadata["strategy"], metadata["budget"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected an object with name, strategy and budget; {type(error).__name__}: {error}"
        ) from error
    config, environment = folder / "config.yaml", folder / "environment.json"
    records, is_truncated = _read_all_records(folder)
    return Setting(
        hash=folder.name,
        name=name,
        strategy=strategy,
        budget=budget if isinstance(budget, int | float | None) else shorten_value(budget),
        role=metadata.get("role", "grid"),
        seed=metadata.get("seed") or 0,
        metric=metadata.get("metric") or "score",
        factors=metadata.get("factors") or {},
        config=(yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.is_file() else {},
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
        records=records,
        is_truncated=is_truncated,
    )


def _sort_settings(settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings of each context: full tokens, then grid, then baselines. Folder names are hashes."""
    roles = ("full", "grid", "baseline")

    def sort_key(setting: Setting) -> tuple[Any, ...]:
        role = roles.index(setting.role) if setting.role in roles else len(roles)
        return setting.context, role, setting.method, budget_sort_key(setting.budget), setting.seed, setting.hash

    return sorted(settings, key=sort_key)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# --- one setting ---------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: Values | Sequence[float], groups: Sequence[str], seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Return the mean over samples and its 95 % interval from a bootstrap over groups.

    Args:
        values: one number per sample, `[samples]`.
        groups: group of each sample, `[samples]`.
        seed: seed of the bootstrap.
        draws: number of bootstrap samples.

    Raises:
        ValueError: if `values` and `groups` differ in length.
    """
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} values and {len(groups)} groups; expected one group for each value")
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    # Groups are sorted, so that the result does not depend on the order of the samples.
    index = {group: number for number, group in enumerate(sorted(set(groups)))}
    group_ids = np.array([index[group] for group in groups])
    sums = np.bincount(group_ids, weights=np.asarray(values, dtype=float))
    sizes = np.bincount(group_ids).astype(float)
    mean = float(sums.sum() / sizes.sum())
    if len(sums) < 2:
        return Interval(mean, math.nan, math.nan, len(values), len(sums))
    random, step = np.random.default_rng(seed), max(1, CHUNK // len(sums))
    means = []
    for first in range(0, draws, step):
        resampled = random.integers(0, len(sums), (min(step, draws - first), len(sums)))  # [draws, groups]
        means.append(sums[resampled].sum(axis=1) / sizes[resampled].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(mean, float(low), float(high), len(values), len(sums))


def mean_score(records: Iterable[Record], seed: int = 0) -> Interval:
    """Return the mean score of records with its interval.

    Args:
        records: records without errors.
        seed: seed of the bootstrap.
    """
    rows = list(records)
    return bootstrap_interval([float(row["score"]) for row in rows], [str(row["group"]) for row in rows], seed)


def scores_by_field(setting: Setting, name: str, seed: int = 0) -> dict[str, Interval]:
    """Return the mean score for each value of a record field, such as ``type`` or ``split``.

    Args:
        setting: the setting.
        name: the record field.
        seed: seed of the bootstrap.
    """
    by_value: dict[str, list[Record]] = {}
    for record in setting.valid_records.values():
        by_value.setdefault(str(record.get(name) or ""), []).append(record)
    return {value: mean_score(by_value[value], seed) for value in sorted(by_value)}


# --- two settings --------------------------------------------------------------------------------------------------


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        only_first: number of samples that only the first setting answers correctly.
        only_second: number of samples that only the second setting answers correctly.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def compare(first: Setting, second: Setting, seed: int = 0) -> Difference:
    """Return the first setting minus the second one on their common samples without an error.

    Args:
        first: the minuend.
        second: the subtrahend.
        seed: seed of the bootstrap.
    """
    common = [sample for sample in first.valid_records if sample in second.valid_records]
    pairs = [(first.valid_records[sample], second.valid_records[sample]) for sample in common]
    gaps = [float(a["score"]) - float(b["score"]) for a, b in pairs]
    only_first = sum(bool(a["correct"]) and not b["correct"] for a, b in pairs)
    only_second = sum(bool(b["correct"]) and not a["correct"] for a, b in pairs)
    return Difference(
        bootstrap_interval(gaps, [str(a["group"]) for a, _ in pairs], seed),
        only_first,
        only_second,
        mcnemar(only_first, only_second) if pairs else math.nan,
        len(first.valid_records) + len(second.valid_records) - 2 * len(common),
    )


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction for multiple comparisons.

    Args:
        p_values: p-values of one family; NaN entries stay NaN and are not counted.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected, least = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        corrected[index] = least
    return corrected


def correct_differences(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with p-values after Holm's correction over all of them.

    Args:
        differences: the comparisons of one table.
    """
    adjusted = correct_p_values([difference.p for difference in differences])
    return [replace(difference, holm=p) for difference, p in zip(differences, adjusted, strict=True)]


def find_full_setting(setting: Setting, settings: Iterable[Setting]) -> Setting | None:
    """Return the setting with all tokens and the most similar configuration, or `None` without such a setting.

    Args:
        setting: the setting to compare.
        settings: all settings.
    """
    candidates = [full for full in settings if full.role == "full" and full.context == setting.context]
    return _closest(setting, candidates)


def find_random_settings(setting: Setting, settings: Iterable[Setting]) -> dict[int, Setting]:
    """Return, by seed, the settings with random tokens at the same budget.

    Args:
        setting: the setting to compare.
        settings: all settings.
    """
    by_seed: dict[int, list[Setting]] = {}
    for random in settings:
        if random.strategy == "Random" and (random.context, random.budget) == (setting.context, setting.budget):
            by_seed.setdefault(random.seed, []).append(random)
    closest = {seed: _closest(setting, candidates) for seed, candidates in sorted(by_seed.items())}
    return {seed: random for seed, random in closest.items() if random is not None}


def _closest(setting: Setting, candidates: Sequence[Setting]) -> Setting | None:
    """Return the candidate that shares the most generation options, such as the precision, with the setting."""
    options = ("max_new_tokens", "temperature", "dtype", "batch_size", "device", "seed")

    def n_shared(candidate: Setting) -> int:
        return sum(setting.config.get(name) == candidate.config.get(name) for name in options)

    return max(candidates, key=n_shared, default=None)


# --- all settings --------------------------------------------------------------------------------------------------


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
    names = {_key(setting.factors[name]): setting.factors[name] for setting in grid}
    blocks: dict[str, dict[str, Setting]] = {}
    for setting in grid:
        blocks.setdefault(_remaining_factors(setting, name), {}).setdefault(_key(setting.factors[name]), setting)
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
    return _key([remaining, {key: value for key, value in fixed.items() if key not in (path[0], path[-1])}])


def compare_factors(settings: Sequence[Setting], seed: int = 0) -> list[Factor]:
    """Return the level comparison of every factor with more than one level in the grid.

    Args:
        settings: the settings; settings outside the grid are ignored.
        seed: seed of the bootstrap.
    """
    grid = [setting for setting in settings if setting.role == "grid"]
    names = dict.fromkeys(name for setting in grid for name in setting.factors)
    varied = [n for n in names if len({_key(setting.factors[n]) for setting in grid if n in setting.factors}) > 1]
    return [compare_levels(grid, name, seed) for name in varied]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points on the Pareto front, cheapest first.

    A point is on the front if no other point is better in both cost and score.

    Args:
        points: cost (less is better) and score (more is better) of each point.
    """
    order = sorted(
        (index for index, point in enumerate(points) if not any(map(math.isnan, point))),
        key=lambda index: (points[index][0], -points[index][1]),
    )
    front: list[int] = []
    for index in order:
        # Identical points do not dominate each other.
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
