"""Runs experiments (model x reducer x task x seed) and writes their records; each image is encoded once."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml

from tokenprune.adapter import Adapter, find_adapter
from tokenprune.cli.errors import MultipleUserError
from tokenprune.configuration import as_config
from tokenprune.decoder_reducer import AtLayer
from tokenprune.experiments.evaluation.answers import answer_group
from tokenprune.experiments.evaluation.environment import describe_environment
from tokenprune.experiments.evaluation.identity import (
    SampleDigests,
    check_identities,
    find_model_folders,
    has_records,
)
from tokenprune.experiments.evaluation.loading import load
from tokenprune.experiments.evaluation.records import (
    NAME,
    RecordFile,
    delete_records,
    list_record_files,
    merge_if_complete,
    merge_records,
    read_lines,
    write_atomically,
)
from tokenprune.experiments.evaluation.stored_images import (
    IMAGES,
    is_stored,
)
from tokenprune.experiments.evaluation.tasks import Boards, Task
from tokenprune.pipeline import Pipeline, count_tower_passes
from tokenprune.policies import Configurable
from tokenprune.reducer import TokenReducer
from tokenprune.requirements import describe_attention, list_missing_signals
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED

IMAGES_WITH_PIXELS = 4
"""Number of images of a run whose selections carry pixels for `on_record`."""


@dataclass
class Experiment(Configurable):
    """The configuration of one experiment: model, strategy, task and generation options.

    Args:
        model: ``mini`` or ``mini-pages`` (embedded), a checkpoint folder, or a hub id.
        reducer: the strategy.
        task: the task.
        seed: seed of sampling; has no effect on greedy answers.
        max_new_tokens: longest answer in tokens; not used if the task sets generation options (`LmmsTask` does).
        temperature: temperature of sampling, 0 for greedy answers; not used if the task sets generation options.
        batch_size: questions about one image that are answered together. A crash loses at most one batch.
        dtype: ``auto`` (float32 on a CPU) or the name of a torch dtype.
        device: ``auto`` or a torch device; not part of the hash.
        plugin: Python files whose classes are available by name; not part of the hash.
    """

    model: str = "mini"
    reducer: TokenReducer = field(default_factory=HiRED)
    task: Task = field(default_factory=Boards)
    seed: int = 0
    max_new_tokens: int = 16
    temperature: float = 0.0
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    plugin: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def config(self) -> dict[str, Any]:
        """Return all fields as nested plain data, which the command line can read."""
        return {item.name: as_config(getattr(self, item.name)) for item in fields(self)}

    def hash(self) -> str:
        """Return a 12-character hash of the configuration; key order and explicit defaults do not change it."""
        identity = {name: value for name, value in self.config().items() if name not in ("device", "plugin")}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Setting:
    """One experiment of a grid, with its name and role in tables.

    Args:
        experiment: the experiment.
        name: name in tables and progress output.
        role: ``"grid"``, ``"full"`` (all tokens) or ``"baseline"``.
        factors: the varied options and their formatted values.
    """

    experiment: Experiment
    name: str
    role: str = "grid"
    factors: Mapping[str, Any] = field(default_factory=dict)

    def folder(self, out: Path) -> Path:
        """Return the folder of the records."""
        return out / "settings" / self.experiment.hash()

    def describe(self) -> dict[str, Any]:
        """Return the content of ``setting.json``."""
        reducer = self.experiment.reducer
        return {
            "name": self.name,
            "role": self.role,
            "factors": dict(self.factors),
            "strategy": reducer.label,
            "budget": as_config(reducer.budget_label),
            "seed": find_selection_seed(reducer, self.experiment.seed),
            "metric": self.experiment.task.metric,
            "hash": self.experiment.hash(),
        }


def find_selection_seed(reducer: TokenReducer, default: int) -> int:
    """Return the seed of the first part of a strategy that selects at random.

    Args:
        reducer: the strategy.
        default: the result if no part has a seed.
    """
    strategies = [part.reducer if isinstance(part, AtLayer) else part for part in reducer.list_parts()]
    seeds = [getattr(getattr(strategy, "selection", None), "seed", None) for strategy in strategies]
    return next((seed for seed in seeds if seed is not None), default)


OnRecord = Callable[[Setting, Mapping[str, Any], Selection | None], None]
"""Called with a setting, a record of it and the selection of the record; the selection is None if the sample failed."""


@dataclass
class Progress:
    """Counts and scores of a run so far.

    Args:
        total: records that all settings will have.
        done: records that exist.
        errors: records of samples that failed, earlier runs included.
        images: images that were encoded.
        encodes: passes through the vision tower that encoded them, counted at the tower; 0 if the adapter has no tower.
        more_encodes: further passes through the tower, for strategies before or inside it.
        setting: name of the setting that wrote the last record.
        scores: sum of scores and number of records of each setting in this run.
    """

    total: int
    done: int = 0
    errors: int = 0
    images: int = 0
    encodes: int = 0
    more_encodes: int = 0
    setting: str = ""
    scores: dict[str, tuple[float, int]] = field(default_factory=dict)


def run_settings(
    settings: Sequence[Setting],
    out: Path,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_record: OnRecord | None = None,
    images: int = IMAGES,
) -> Progress:
    """Run experiments that share model and task; samples that have a record are skipped.

    Every image is encoded once, with the signals that all settings together need. The LLM runs once per setting.

    Args:
        settings: the experiments; they differ in reducer and seed only.
        out: the run directory.
        rank: index of this process among the processes that share the samples.
        world: number of these processes.
        on_progress: called at the start and after every record.
        on_record: called with every record and its selection; selections of the first `IMAGES_WITH_PIXELS` images
            carry pixels.
        images: number of images that are stored in the run directory for reports, with the kept tokens in their
            records; evenly spread over the task.

    Returns:
        The final counts; `Progress.errors` counts samples that have an error record.

    Raises:
        ValueError: if the settings do not share model and task, two samples have one id, the model cannot be loaded, or
            it provides no signal that a strategy requires.
        InUseError: if another process writes the same records.
        IdentityError: if existing records belong to another model, data set, code or library version.
    """
    shared = settings[0].experiment
    required = shared.model, shared.dtype, as_config(shared.task)
    for setting in settings:
        experiment = setting.experiment
        if (experiment.model, experiment.dtype, as_config(experiment.task)) != required:
            raise ValueError("settings that run together must share model, dtype and task")
    if len({setting.experiment.reducer.text_model for setting in settings} - {None}) > 1:
        raise ValueError("settings that run together must share reducer.text_model")
    samples = list(shared.task.samples())
    if duplicates := [name for name, number in Counter(sample.id for sample in samples).items() if number > 1]:
        raise ValueError(
            f"{type(shared.task).__name__}: several samples have the id {duplicates[0]!r}; ids must differ"
        )
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.group)]
    assigned_groups = groups[rank::world]
    with ExitStack() as stack:
        files = []
        for setting in settings:
            files.append(stack.enter_context(RecordFile(setting.folder(out), rank if world > 1 else None)))
        digests = SampleDigests(samples)
        identities = check_identities({setting.folder(out): setting.experiment for setting in settings}, out, digests)
        for setting in settings:
            _write_config(setting, out)
            identities[setting.folder(out)].write(setting.folder(out))
        sample_ids = {sample.id for group in assigned_groups for sample in group}
        progress = Progress(len(sample_ids) * len(settings), sum(len(sample_ids & file.done) for file in files))
        progress.errors = sum(len(sample_ids & file.failed) for file in files)
        on_progress(progress)
        if progress.done < progress.total:
            device = _resolve_device(shared.device, rank)
            model, processor = load(shared.model, device, shared.dtype)
            if problems := list_unsupported(model, settings):
                raise MultipleUserError("these settings cannot run", problems)
            adapter, versions = find_adapter(model), describe_environment(model)
            for setting in settings:
                attention = describe_attention(setting.experiment.reducer, adapter)
                source = {} if attention is None else {"attention": attention}
                write_atomically(setting.folder(out) / "environment.json", json.dumps({**versions, **source}, indent=1))
            passes = stack.enter_context(count_tower_passes(adapter))
            for number, group in list(enumerate(groups))[rank::world]:
                pending = [
                    (setting, file, [sample for sample in group if sample.id not in file.done])
                    for setting, file in zip(settings, files, strict=True)
                ]
                directory = out if is_stored(number, len(groups), images) else None
                with_pixels = on_record is not None and progress.images < IMAGES_WITH_PIXELS
                for setting, file, record, selection in answer_group(
                    adapter, processor, group, pending, progress, directory, with_pixels, passes
                ):
                    record["sample_digest"] = digests[record["sample"]]
                    file.add(record)
                    _update_progress(progress, setting, record)
                    if on_record is not None:
                        on_record(setting, record, selection)
                    on_progress(progress)
        if world == 1:
            for setting in settings:
                merge_records(setting.folder(out), [sample.id for sample in samples])
    if world > 1:
        for setting in settings:
            merge_if_complete(setting.folder(out), [sample.id for sample in samples])
    for setting in settings:
        _summarize(setting, out)
    return progress


def check_records(settings: Sequence[Setting], out: Path) -> None:
    """Check that the records in a run directory belong to the present model, data and code.

    Args:
        settings: experiments that share model and task.
        out: the run directory.

    Raises:
        IdentityError: if they do not; the error lists each change.
    """
    if any(has_records(setting.folder(out)) for setting in settings):
        digests = SampleDigests(list(settings[0].experiment.task.samples()))
        check_identities({setting.folder(out): setting.experiment for setting in settings}, out, digests)


def discard_records(settings: Sequence[Setting], out: Path) -> None:
    """Delete the records of experiments, after a check that their data and models exist to run them again.

    Args:
        settings: the experiments.
        out: the run directory.

    Raises:
        ValueError: if the data of a task or a model cannot be found; no record is deleted.
        InUseError: if another process has the records open.
    """
    for task in {
        json.dumps(as_config(setting.experiment.task)): setting.experiment.task for setting in settings
    }.values():
        task.check()
    for setting in settings:
        find_model_folders(setting.experiment)
    for setting in settings:
        delete_records(setting.folder(out))


def _summarize(setting: Setting, out: Path) -> None:
    """Write ``summary.json``: the metrics of the task that need all answers at once, if it has any."""
    folder = setting.folder(out)
    if list_record_files(folder) != [folder / NAME]:  # another process still writes its part
        return
    records = read_lines(folder / NAME)
    answers = {record["sample"]: record["prediction"] for record in records if record["error"] is None}
    file = folder / "summary.json"
    if file.is_file() and json.loads(file.read_text())["answers"] == len(answers):
        return
    if numbers := setting.experiment.task.summary(answers):
        write_atomically(file, json.dumps({"answers": len(answers), "metrics": numbers}, indent=1))


def _update_progress(progress: Progress, setting: Setting, record: Mapping[str, Any]) -> None:
    total, number = progress.scores.get(setting.name, (0.0, 0))
    progress.scores[setting.name] = (total + record["score"], number + 1)
    progress.done += 1
    progress.errors += record["error"] is not None
    progress.setting = setting.name


def rank_and_world() -> tuple[int, int]:
    """Return index and number of the processes that share the work, from the variables that torchrun sets."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _resolve_device(name: str, rank: int) -> str:
    return f"cuda:{rank % torch.cuda.device_count()}" if name == "auto" and torch.cuda.is_available() else name


def _write_config(setting: Setting, out: Path) -> None:
    folder = setting.folder(out)
    if not (folder / "setting.json").is_file():
        write_atomically(folder / "config.yaml", yaml.safe_dump(setting.experiment.config(), sort_keys=False))
        write_atomically(folder / "setting.json", json.dumps(setting.describe(), indent=1))


def list_unsupported(model: Any, settings: Sequence[Setting]) -> list[str]:
    """Return one line for each setting whose strategy requires a signal or a layer that the model does not have.

    Args:
        model: the model; its weights are not read.
        settings: experiments with this model.
    """
    adapter, problems = find_adapter(model), []
    for setting in settings:
        reducer = setting.experiment.reducer
        if missing := list_missing_signals(reducer, adapter):
            problems.append(f"{setting.name}: {type(model).__name__} gives no {', '.join(missing)}")
        elif reducer.reads_question and reducer.text_model is None:
            problems.append(f"{setting.name}: reads the question; set reducer.text_model")
        elif problem := _describe_wrong_cuts(reducer, adapter):
            problems.append(f"{setting.name}: {problem}")
    return problems


def _describe_wrong_cuts(reducer: TokenReducer, adapter: Adapter) -> str | None:
    """Return the reason if the cuts of a strategy do not fit the LLM of a model; None if they fit."""
    try:
        Pipeline(reducer, adapter)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return None
