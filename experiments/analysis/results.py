"""Reads the settings of a run directory with their records."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml

from tokenprune.budget import format_budget
from tokenprune.display import format_table
from tokenprune.experiments.analysis.intervals import Interval, Values, bootstrap_interval
from tokenprune.experiments.evaluation.records import list_record_files

Record: TypeAlias = Mapping[str, Any]
Budget: TypeAlias = float | str | None
LAYOUT = "a folder with settings/<hash>/setting.json and settings/<hash>/records.jsonl, as `tokenprune ablate` writes"
"""Layout of a run directory, for error messages."""


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
            if key == "reducer" and (text.startswith(self.strategy) or "(" in text or "+" in text):
                name = text  # each level is a complete reducer, so its arguments distinguish the levels
            elif text != self.strategy:
                parts.append(f"{key.removeprefix('reducer.')}={text}")
        return ", ".join([name, *parts])

    @property
    def context(self) -> tuple[str, str]:
        """Model and task as JSON. Two settings are comparable only if they share both."""
        return config_key(self.config.get("model")), config_key(self.config.get("task"))

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

    @cached_property
    def evidence_coverage(self) -> Interval:
        """Mean share of the evidence that kept tokens cover, over the samples without an error and with evidence."""
        rows = [row for row in self.valid_records.values() if row.get("evidence_coverage") is not None]
        return mean_of_field(rows, "evidence_coverage")

    def mean(self, name: str) -> float:
        """Return the mean of a numeric record field over the samples without an error.

        Args:
            name: the record field.
        """
        return float(np.mean(self._numbers(name))) if self.valid_records else math.nan

    def median(self, *names: str) -> float:
        """Return the median of a sum of numeric record fields over the samples with these fields and without an error.

        Args:
            names: the record fields to sum.
        """
        sums = np.array(sum(self._numbers(name) for name in names))
        return float(np.nanmedian(sums)) if self.valid_records and not np.isnan(sums).all() else math.nan

    @property
    def average_tokens(self) -> float:
        """Mean visual tokens of a prompt, averaged over the LLM layers; from older records the kept tokens.

        Without a strategy inside the LLM, these are the kept tokens.
        """
        average = self.mean("average_tokens")
        return self.mean("kept") if math.isnan(average) else average

    @property
    def flops_share(self) -> float:
        """FLOPs of prefill in the LLM as a share of the FLOPs with all tokens; NaN in records of older runs."""
        full = self.mean("prefill_flops_full")
        return self.mean("prefill_flops") / full if full else math.nan

    @property
    def tower_patches_share(self) -> float:
        """Patches in the layers of the vision tower as a share of all; NaN without a strategy before or inside it."""
        full = self.mean("tower_patches_full")
        return self.mean("tower_patches") / full if full else math.nan

    @property
    def tower_flops_share(self) -> float:
        """FLOPs of the vision tower as a share of those of the unmodified model, on the counted samples; else NaN."""
        counted = [row for row in self.valid_records.values() if row.get("tower_flops_full")]
        full = sum(row["tower_flops_full"] for row in counted)
        return sum(row["tower_flops"] for row in counted) / full if full else math.nan

    @property
    def time_alone(self) -> float:
        """Median time of a sample in milliseconds as if the setting ran by itself: preparation and generation.

        Preparation is encoding and selection. Records of older versions have only the encoding that all settings
        share, which is then added to the selection.
        """
        alone = self.median("prepare_alone_ms")
        shared = self.median("encode_ms", "select_ms", "generate_ms")
        return shared if math.isnan(alone) else alone + self.median("generate_ms")

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

    def _repr_html_(self) -> str:
        """Return the scores with 95 % intervals as an HTML table for Jupyter, one row per setting."""
        rows = []
        for setting in self.settings:
            score = setting.score
            interval = f"{score.low:.1%} to {score.high:.1%}" if score.has_bounds else ""
            budget = "" if setting.budget is None else format_budget(setting.budget)
            rows.append([setting.method, budget, f"{score.mean:.1%}", interval, f"{score.n}", f"{setting.n_errors}"])
        columns = ["method", "budget", "score", "95 % interval", "samples", "errors"]
        return format_table(columns, rows, self.name) + "".join(f"<p>{escape(note)}</p>" for note in self.notes)


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
        setting = read_setting(folder)
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


def read_setting(folder: Path) -> Setting:
    """Return the setting of a folder with its records.

    Args:
        folder: the folder of the setting, with setting.json.

    Raises:
        ValueError: if setting.json or a record is invalid, or two records have one sample id.
    """
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


def config_key(value: Any) -> str:
    """Return a configuration value as JSON with sorted keys; equal values have equal keys.

    Args:
        value: any YAML value.
    """
    return json.dumps(value, sort_keys=True, default=str)


def mean_score(records: Iterable[Record], seed: int = 0) -> Interval:
    """Return the mean score of records with its interval.

    Args:
        records: records without errors.
        seed: seed of the bootstrap.
    """
    return mean_of_field(records, "score", seed)


def mean_of_field(records: Iterable[Record], name: str, seed: int = 0) -> Interval:
    """Return the mean of a numeric field of records with its interval.

    Args:
        records: records without errors that have the field.
        name: the record field.
        seed: seed of the bootstrap.
    """
    rows = list(records)
    return bootstrap_interval([float(row[name]) for row in rows], [str(row["group"]) for row in rows], seed)


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


def find_full_setting(setting: Setting, settings: Iterable[Setting]) -> Setting | None:
    """Return the setting with all tokens and the most similar configuration, or `None` without such a setting.

    Args:
        setting: the setting to compare.
        settings: all settings.
    """
    candidates = [full for full in settings if full.role == "full" and full.context == setting.context]
    return _closest(setting, candidates)


def is_random_strategy(strategy: str) -> bool:
    """Return whether a strategy keeps random tokens at each of its stages: ``Random``, ``Random+AtLayer(Random)``.

    Args:
        strategy: the label of the strategy.
    """
    return set(strategy.split("+")) <= {"Random", "AtLayer(Random)"}


def find_random_settings(setting: Setting, settings: Iterable[Setting]) -> dict[int, Setting]:
    """Return, by seed, the settings with random tokens at the same budget.

    Args:
        setting: the setting to compare.
        settings: all settings.
    """
    by_seed: dict[int, list[Setting]] = {}
    for random in settings:
        if is_random_strategy(random.strategy) and (random.context, random.budget) == (setting.context, setting.budget):
            by_seed.setdefault(random.seed, []).append(random)
    closest = {seed: _closest(setting, candidates) for seed, candidates in sorted(by_seed.items())}
    return {seed: random for seed, random in closest.items() if random is not None}


def _closest(setting: Setting, candidates: Sequence[Setting]) -> Setting | None:
    """Return the candidate that shares the most generation options, such as the precision, with the setting."""
    options = ("max_new_tokens", "temperature", "dtype", "batch_size", "device", "seed")

    def n_shared(candidate: Setting) -> int:
        return sum(setting.config.get(name) == candidate.config.get(name) for name in options)

    return max(candidates, key=n_shared, default=None)
