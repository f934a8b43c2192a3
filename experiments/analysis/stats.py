"""Intervals, paired differences and factor effects from the records of a run directory.

Samples about one image are not independent, so every interval comes from a bootstrap that resamples groups, which are
the samples of one image. Two experiments are compared sample by sample. ``docs/explanation/statistics.md`` says why.
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

from tokenprune.experiments.evaluation.records import files_of

Record: TypeAlias = Mapping[str, Any]
Budget: TypeAlias = float | str | None
Values: TypeAlias = NDArray[np.float64]

DRAWS = 2000
"""Bootstrap samples of an interval."""
CHUNK = 2_000_000
"""Numbers drawn at a time, so that many groups do not fill the memory."""
LAYOUT = "a folder with settings/<hash>/setting.json and settings/<hash>/records.jsonl, as `tokenprune ablate` writes"
"""The layout of a run directory, for messages."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Args:
        mean: mean over samples; not a number without samples.
        low: lower end; not a number with fewer than two groups, which say nothing about the spread.
        high: upper end.
        n: samples.
        groups: groups they come from.
    """

    mean: float
    low: float
    high: float
    n: int
    groups: int

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return not math.isnan(self.low)

    @property
    def holds_zero(self) -> bool:
        """Whether zero lies inside; an interval that is not known excludes nothing."""
        return not self.known or self.low <= 0 <= self.high


@dataclass(frozen=True)
class Difference:
    """One experiment minus another on the samples that both answered.

    Args:
        score: mean difference of the scores.
        only_first: samples that only the first has right.
        only_second: samples that only the second has right.
        p: McNemar's exact p-value.
        unpaired: samples that only one of the two answered without an error.
        holm: the p-value after Holm's correction over a table, where there is one.
    """

    score: Interval
    only_first: int
    only_second: int
    p: float
    unpaired: int
    holm: float | None = None

    @property
    def verdict(self) -> str:
        """What the interval says, in words."""
        if not self.score.n:
            return "no sample in common"
        if not self.score.known:
            return "no interval: one group"
        if self.score.holds_zero:
            return "no difference seen"
        found = "higher" if self.score.mean > 0 else "lower"
        return found if self.holm is None or self.holm < 0.05 else f"{found}, alone but not after Holm"


@dataclass(frozen=True, eq=False)
class Setting:
    """One experiment: a model, a reducer, a task and a seed, with what was recorded.

    Args:
        hash: name of its folder.
        name: its full name.
        strategy: name of the strategy.
        budget: budget as a ratio, as a count if it is an `int`, or in words; `None` if the strategy has none.
        role: ``grid``, ``full`` or ``baseline``.
        seed: seed of the experiment.
        metric: what the scores are.
        factors: the values that the grid set, by dotted name.
        config: the resolved configuration.
        environment: versions and device.
        records: one per sample, those with an error included.
        torn: whether the last line was cut off and left out.
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
    torn: bool = False

    @property
    def method(self) -> str:
        """The strategy with everything the grid changed but budget, seed, model and task."""
        if self.role == "full":
            return "full tokens"
        name, parts = self.strategy, []
        for key, value in self.factors.items():
            path = key.split(".")
            if path[0] in ("model", "task") or path[-1] == "seed" or "budget" in path:
                continue
            text = short(value)
            if key == "reducer" and text.startswith(self.strategy):
                name = text  # a whole reducer as a level: its arguments tell levels apart
            elif text != self.strategy:
                parts.append(f"{key.removeprefix('reducer.')}={text}")
        return ", ".join([name, *parts])

    @property
    def context(self) -> tuple[str, str]:
        """Model and task, which two experiments must share to be compared."""
        return _key(self.config.get("model")), _key(self.config.get("task"))

    @cached_property
    def answered(self) -> Mapping[str, Record]:
        """The records without an error by sample."""
        return {str(record["sample"]): record for record in self.records if record.get("error") is None}

    @property
    def n_errors(self) -> int:
        """Records with an error."""
        return len(self.records) - len(self.answered)

    @cached_property
    def score(self) -> Interval:
        """Mean score over the samples without an error."""
        return mean_score(self.answered.values())

    def mean(self, name: str) -> float:
        """Return the mean of a number that every record holds.

        Args:
            name: its name.
        """
        return float(np.mean(self._numbers(name))) if self.answered else math.nan

    def median(self, *names: str) -> float:
        """Return the median over samples of a sum of numbers that every record holds.

        Args:
            names: their names.
        """
        return float(np.median(sum(self._numbers(name) for name in names))) if self.answered else math.nan

    def _numbers(self, name: str) -> Values:
        found = (record.get(name) for record in self.answered.values())
        return np.array([math.nan if number is None else number for number in found], dtype=float)


@dataclass(frozen=True)
class Results:
    """What was read from a run directory.

    Args:
        name: name of the directory.
        settings: the experiments.
        notes: what a reader should know about how complete they are.
        directory: where they were read.
    """

    name: str
    settings: Sequence[Setting]
    notes: Sequence[str] = ()
    directory: Path | None = None


@dataclass(frozen=True)
class Level:
    """One level of a factor, averaged over all other factors.

    Args:
        name: the level.
        score: mean score.
        behind: best level minus this one, paired; `None` for the best level itself.
    """

    name: str
    score: Interval
    behind: Interval | None


@dataclass(frozen=True)
class Factor:
    """What the levels of a factor reach under the same values of all other factors.

    Args:
        name: dotted name of the factor.
        levels: its levels, best first; empty if no setting of the others was run at every level.
        settings: experiments that were used.
        left_out: experiments without a partner at every other level.
    """

    name: str
    levels: Sequence[Level]
    settings: int
    left_out: int

    @property
    def separated(self) -> bool:
        """Whether the best level is ahead of every other one."""
        return all(level.behind is None or not level.behind.holds_zero for level in self.levels)


def short(value: Any) -> str:
    """Return a value of a configuration as a short text: classes without their module, absolute paths by their end.

    Args:
        value: any value that YAML can hold.
    """
    if isinstance(value, Mapping):
        if "class_path" not in value:
            return ", ".join(f"{key}={short(entry)}" for key, entry in value.items())
        inside = short(value.get("init_args") or {})
        return short(value["class_path"]) + (f"({inside})" if inside else "")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(short, value))}]"
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    if text.startswith("/"):
        text = "/".join(Path(text).parts[-2:])
    return re.sub(r"^(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


def budget_order(budget: Budget) -> tuple[int, float, str]:
    """Return what budgets are sorted by: ratios, then counts, then those in words, then none.

    Args:
        budget: the budget.
    """
    if budget is None:
        return 3, 0.0, ""
    return (2, 0.0, budget) if isinstance(budget, str) else (int(isinstance(budget, int)), budget, "")


# --- reading ----------------------------------------------------------------------------------------------------------


def read(directory: Path) -> Results:
    """Read a run directory.

    Args:
        directory: the directory.

    Raises:
        ValueError: if it is no run directory, holds no record yet, or holds a broken or repeated record.
    """
    if not (directory / "settings").is_dir():
        inside = (
            " (this is one setting: give the folder two levels up)" if (directory / "setting.json").is_file() else ""
        )
        state = "has no folder settings/" if directory.is_dir() else "does not exist"
        raise ValueError(f"{directory} {state}{inside}; expected {LAYOUT}. Run one of them with this folder first.")
    settings, notes = [], []
    for folder in sorted(path for path in (directory / "settings").iterdir() if path.is_dir()):
        if not (folder / "setting.json").is_file() or not files_of(folder):
            notes.append(f"settings/{folder.name} has no setting.json or no records.jsonl and was left out.")
            continue
        setting = _read_setting(folder)
        if setting.torn:
            notes.append(f"{setting.name} ({setting.hash}): the last line of its records is cut off and was left out.")
        if setting.records:
            settings.append(setting)
        else:
            notes.append(f"{setting.name} ({setting.hash}) has no record yet and was left out.")
    if not settings:
        raise ValueError(
            f"{directory} holds no record; expected {LAYOUT}. Run one of them to the end, or a little longer."
        )
    return Results(directory.resolve().name, _in_order(settings), notes, directory)


def read_records(path: Path) -> tuple[list[Record], bool]:
    """Return the records of a file and whether its last line was torn by a kill and left out.

    Args:
        path: a file of one JSON object a line.

    Raises:
        ValueError: if any other line is broken, or a sample is there twice.
    """
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records: list[Record] = []
    place: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:  # broken JSON, or a character cut in two
            if number == len(lines):
                return records, True
            raise ValueError(f"{where}: not a JSON object ({error}); only the last line may be cut off") from error
        _check(record, where)
        sample = str(record["sample"])
        if sample in place:
            raise ValueError(
                f"{where}: sample {sample!r} stands already in line {place[sample]}; "
                "delete one of the two lines, or the whole file and run the experiment again"
            )
        place[sample] = number
        records.append(record)
    return records, False


def _all_records(folder: Path) -> tuple[list[Record], bool]:
    """Return the records of all files of a setting, each sample once, and whether a last line was torn."""
    found: dict[str, tuple[Record, Path]] = {}
    torn = False
    for path in files_of(folder):
        records, cut = read_records(path)
        torn |= cut
        for record in records:
            # The same record twice is what a kill leaves between putting files together and deleting them.
            other, place = found.setdefault(str(record["sample"]), (record, path))
            if other != record:
                raise ValueError(f"{path}: sample {record['sample']!r} stands already in {place.name}, not the same")
    return [record for record, _ in found.values()], torn


def _check(record: Any, where: str) -> None:
    """Refuse a record that the statistics cannot use."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    missing = [name for name in ("sample", "group", "score", "correct") if name not in record]
    if missing:
        raise ValueError(f"{where}: the record lacks {', '.join(missing)}")
    score = record["score"]
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"{where}: expected a score from 0 to 1, got {score!r}")


def _read_setting(folder: Path) -> Setting:
    path = folder / "setting.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        name, strategy, budget = about["name"], about["strategy"], about["budget"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected an object with name, strategy and budget; {type(error).__name__}: {error}"
        ) from error
    config, environment = folder / "config.yaml", folder / "environment.json"
    records, torn = _all_records(folder)
    return Setting(
        hash=folder.name,
        name=name,
        strategy=strategy,
        budget=budget if isinstance(budget, int | float | None) else short(budget),
        role=about.get("role", "grid"),
        seed=about.get("seed") or 0,
        metric=about.get("metric") or "score",
        factors=about.get("factors") or {},
        config=(yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.is_file() else {},
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
        records=records,
        torn=torn,
    )


def _in_order(settings: Iterable[Setting]) -> list[Setting]:
    """Return full tokens first, then the grid, then the baselines: folders are named by hash, which is no order."""
    roles = ("full", "grid", "baseline")

    def place(setting: Setting) -> tuple[Any, ...]:
        role = roles.index(setting.role) if setting.role in roles else len(roles)
        return setting.context, role, setting.method, budget_order(setting.budget), setting.seed, setting.hash

    return sorted(settings, key=place)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# --- one experiment ---------------------------------------------------------------------------------------------------


def interval(values: Values | Sequence[float], groups: Sequence[str], seed: int = 0, draws: int = DRAWS) -> Interval:
    """Return a mean over samples and its 95 % interval from a bootstrap over groups.

    Args:
        values: one number a sample, `[samples]`.
        groups: group of each sample, `[samples]`.
        seed: seed of the bootstrap.
        draws: bootstrap samples.
    """
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} values and {len(groups)} groups; expected one group for each value")
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    # Sorted, so that the order in which samples were answered does not matter.
    index = {group: place for place, group in enumerate(sorted(set(groups)))}
    of = np.array([index[group] for group in groups])
    sums = np.bincount(of, weights=np.asarray(values, dtype=float))
    sizes = np.bincount(of).astype(float)
    mean = float(sums.sum() / sizes.sum())
    if len(sums) < 2:
        return Interval(mean, math.nan, math.nan, len(values), len(sums))
    random, step = np.random.default_rng(seed), max(1, CHUNK // len(sums))
    means = []
    for first in range(0, draws, step):
        chosen = random.integers(0, len(sums), (min(step, draws - first), len(sums)))  # [draws, groups]
        means.append(sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(mean, float(low), float(high), len(values), len(sums))


def mean_score(records: Iterable[Record], seed: int = 0) -> Interval:
    """Return the mean score of records with its interval.

    Args:
        records: records without errors.
        seed: seed of the bootstrap.
    """
    rows = list(records)
    return interval([float(row["score"]) for row in rows], [str(row["group"]) for row in rows], seed)


def by(setting: Setting, name: str, seed: int = 0) -> dict[str, Interval]:
    """Return the mean score for each value of a field, such as ``type`` or ``split``.

    Args:
        setting: the experiment.
        name: the field.
        seed: seed of the bootstrap.
    """
    parts: dict[str, list[Record]] = {}
    for record in setting.answered.values():
        parts.setdefault(str(record.get(name) or ""), []).append(record)
    return {value: mean_score(parts[value], seed) for value in sorted(parts)}


# --- two experiments --------------------------------------------------------------------------------------------------


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        only_first: samples that only the first experiment has right.
        only_second: samples that only the second one has right.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def compare(first: Setting, second: Setting, seed: int = 0) -> Difference:
    """Compare two experiments on the samples that both answered without an error.

    Args:
        first: an experiment.
        second: the one to subtract.
        seed: seed of the bootstrap.
    """
    common = [sample for sample in first.answered if sample in second.answered]
    pairs = [(first.answered[sample], second.answered[sample]) for sample in common]
    gaps = [float(a["score"]) - float(b["score"]) for a, b in pairs]
    only_first = sum(bool(a["correct"]) and not b["correct"] for a, b in pairs)
    only_second = sum(bool(b["correct"]) and not a["correct"] for a, b in pairs)
    return Difference(
        interval(gaps, [str(a["group"]) for a, _ in pairs], seed),
        only_first,
        only_second,
        mcnemar(only_first, only_second) if pairs else math.nan,
        len(first.answered) + len(second.answered) - 2 * len(common),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction for looking at all of them.

    Args:
        p_values: p-values of one family; those that are not numbers stay so and do not count.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, least = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        corrected[place] = least
    return corrected


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Return differences with Holm's correction over all of them.

    Args:
        differences: the comparisons of one table.
    """
    adjusted = holm([difference.p for difference in differences])
    return [replace(difference, holm=p) for difference, p in zip(differences, adjusted, strict=True)]


def full_of(setting: Setting, settings: Iterable[Setting]) -> Setting | None:
    """Return the experiment with all tokens to compare with, or `None`.

    Args:
        setting: an experiment.
        settings: all experiments.
    """
    return _closest(setting, [other for other in settings if other.role == "full" and other.context == setting.context])


def randoms_of(setting: Setting, settings: Iterable[Setting]) -> dict[int, Setting]:
    """Return the experiments with random tokens at the same budget by seed.

    Args:
        setting: an experiment.
        settings: all experiments.
    """
    found: dict[int, list[Setting]] = {}
    for other in settings:
        if other.strategy == "Random" and (other.context, other.budget) == (setting.context, setting.budget):
            found.setdefault(other.seed, []).append(other)
    closest = {seed: _closest(setting, others) for seed, others in sorted(found.items())}
    return {seed: other for seed, other in closest.items() if other is not None}


def _closest(setting: Setting, others: Sequence[Setting]) -> Setting | None:
    """Return the experiment that agrees most in what is left of the configuration, such as precision."""
    rest = ("max_new_tokens", "temperature", "dtype", "batch_size", "device", "seed")

    def agreement(other: Setting) -> int:
        return sum(setting.config.get(name) == other.config.get(name) for name in rest)

    return max(others, key=agreement, default=None)


# --- all experiments --------------------------------------------------------------------------------------------------


def factor(settings: Iterable[Setting], name: str, seed: int = 0) -> Factor:
    """Compare the levels of a factor, averaged over the other factors.

    Only values of the other factors that were run at every level count, and of these only the samples that every level
    answered: an unfinished grid must not favor the level that met the easier half.

    Args:
        settings: the experiments; those outside the grid are left out.
        name: dotted name of the factor.
        seed: seed of the bootstrap.
    """
    grid = [setting for setting in settings if setting.role == "grid" and name in setting.factors]
    names = {_key(setting.factors[name]): setting.factors[name] for setting in grid}
    blocks: dict[str, dict[str, Setting]] = {}
    for setting in grid:
        blocks.setdefault(_others(setting, name), {}).setdefault(_key(setting.factors[name]), setting)
    complete = [block for block in blocks.values() if len(block) == len(names)]
    scores: dict[str, list[float]] = {key: [] for key in names}
    groups: list[str] = []
    used = 0
    for block in complete:
        first = next(iter(block.values()))
        common = [s for s in first.answered if all(s in other.answered for other in block.values())]
        used += len(block) if common else 0
        groups += [f"{first.context[1]} {first.answered[sample]['group']}" for sample in common]
        for key, setting in block.items():
            scores[key] += [float(setting.answered[sample]["score"]) for sample in common]
    if not groups:
        return Factor(name, (), 0, len(grid))
    means = {key: np.array(found) for key, found in scores.items()}
    order = sorted(means, key=lambda key: -means[key].mean())
    levels = [
        Level(
            short(names[key]),
            interval(means[key], groups, seed),
            None if key == order[0] else interval(means[order[0]] - means[key], groups, seed),
        )
        for key in order
    ]
    return Factor(name, levels, used, len(grid) - used)


def _others(setting: Setting, name: str) -> str:
    """Return everything but one factor that two experiments must share to differ in that factor alone."""
    model, task = setting.context
    path = name.split(".")
    rest = {key: value for key, value in setting.factors.items() if key != name}
    fixed = {"model": model, "task": task, "seed": setting.seed}
    return _key([rest, {key: value for key, value in fixed.items() if key not in (path[0], path[-1])}])


def factors(settings: Sequence[Setting], seed: int = 0) -> list[Factor]:
    """Compare the levels of every factor of the grid that has more than one.

    Args:
        settings: the experiments.
        seed: seed of the bootstrap.
    """
    grid = [setting for setting in settings if setting.role == "grid"]
    names = dict.fromkeys(name for setting in grid for name in setting.factors)
    varied = [n for n in names if len({_key(setting.factors[n]) for setting in grid if n in setting.factors}) > 1]
    return [factor(grid, name, seed) for name in varied]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the points that no other beats in cost and score at once, cheapest first.

    Args:
        points: cost (less is better) and score (more is better) of each.
    """
    order = sorted(
        (place for place, point in enumerate(points) if not any(map(math.isnan, point))),
        key=lambda place: (points[place][0], -points[place][1]),
    )
    front: list[int] = []
    for place in order:
        # Two at the same point do not beat each other.
        if not front or points[place][1] > points[front[-1]][1] or points[place] == points[front[-1]]:
            front.append(place)
    return front
