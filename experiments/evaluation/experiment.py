"""Runs experiments (model x reducer x task x seed) and writes their records; each image is encoded once."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml

from tokenprune.adapter import Adapter, Encoding, find_adapter
from tokenprune.configuration import as_config
from tokenprune.experiments.evaluation.identity import (
    LIBRARIES,
    SampleDigests,
    check_identities,
    find_model_folders,
    has_records,
)
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.experiments.evaluation.records import (
    NAME,
    RecordFile,
    delete_records,
    list_record_files,
    merge,
    merge_if_complete,
    read_lines,
    write_atomically,
)
from tokenprune.experiments.evaluation.stored_images import (
    IMAGES,
    add_pixels,
    image_name,
    is_stored,
    selection_to_record,
    store_image,
)
from tokenprune.experiments.evaluation.tasks import Boards, Sample, Task
from tokenprune.pipeline import Pipeline, count_encodes, describe_attention, list_missing_signals
from tokenprune.policies import Configurable
from tokenprune.reducer import TokenReducer
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED

IMAGES_WITH_PIXELS = 4
"""Number of images of a run whose selections carry pixels for `on_record`."""


@dataclass
class Experiment(Configurable):
    """The configuration of one experiment: model, strategy, task and generation options.

    Args:
        model: ``mini`` (embedded), a checkpoint folder, or a hub id.
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
            "strategy": type(reducer).__name__,
            "budget": as_config(reducer.budget),
            "seed": getattr(getattr(reducer, "selection", None), "seed", self.experiment.seed),
            "metric": self.experiment.task.metric,
            "hash": self.experiment.hash(),
        }


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
        more_encodes: further passes through the tower, by strategies that encode at another resolution.
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
                raise ValueError("these settings cannot run:\n  " + "\n  ".join(problems))
            adapter, versions = find_adapter(model), environment(model)
            for setting in settings:
                attention = describe_attention(setting.experiment.reducer, adapter)
                source = {} if attention is None else {"attention": attention}
                write_atomically(setting.folder(out) / "environment.json", json.dumps({**versions, **source}, indent=1))
            passes = stack.enter_context(count_encodes(adapter))
            for number, group in list(enumerate(groups))[rank::world]:
                pending = [
                    (setting, file, [sample for sample in group if sample.id not in file.done])
                    for setting, file in zip(settings, files, strict=True)
                ]
                directory = out if is_stored(number, len(groups), images) else None
                with_pixels = on_record is not None and progress.images < IMAGES_WITH_PIXELS
                for setting, file, record, selection in _run_group(
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
                merge(setting.folder(out), [sample.id for sample in samples])
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
    """Return one line for each setting whose strategy requires a signal that the model does not provide.

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
    return problems


def environment(model: Any) -> dict[str, Any]:
    """Return versions, device and commit, the content of ``environment.json``."""

    def installed_version(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    device = str(model.device)
    return {
        **{package: installed_version(package) for package in LIBRARIES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(model.device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "commit": _read_commit(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _read_commit() -> str | None:
    """Return the commit of this code, with `-dirty` if files were changed since; None outside a checkout of it."""
    folder = Path(__file__).resolve().parent
    try:
        # An installed copy may lie in a checkout of another project, whose commit would be wrong here.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=True)
        command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


PendingSetting = tuple[Setting, RecordFile, list[Sample]]


def _run_group(
    adapter: Adapter,
    processor: Any,
    group: Sequence[Sample],
    pending: Sequence[PendingSetting],
    progress: Progress,
    out: Path | None,
    with_pixels: bool,
    passes: Sequence[int],
) -> Iterator[tuple[Setting, RecordFile, dict[str, Any], Selection | None]]:
    """Yield the missing records of all settings for one image, which is encoded once, and stored if `out` is set."""
    if not any(missing for _, _, missing in pending):
        return
    reducers = [setting.experiment.reducer for setting, _, _ in pending]
    text_model = next((reducer.text_model for reducer in reducers if reducer.text_model), None)
    model = adapter.model
    needs = [signal for setting, _, _ in pending for signal in Pipeline(setting.experiment.reducer, adapter).needs]
    try:
        image = group[0].image()
        before = passes[0]
        began = time.perf_counter()
        with torch.no_grad():
            inputs = model_inputs(model, processor, image, [group[0].question], group[0].group)
            encoding = adapter.encode(inputs, needs, 0, text_model)
        encode_ms = (time.perf_counter() - began) * 1000
        if out is not None or with_pixels:  # after the timing
            encoding = add_pixels(encoding, adapter, inputs)
    except Exception as error:  # one unreadable image must not stop the run
        for setting, file, missing in pending:
            for sample in missing:
                yield setting, file, _error_record(sample, error), None
        return
    progress.images += 1
    progress.encodes += passes[0] - before
    name, pixels = None, encoding.images[0].pixels
    if out is not None and pixels is not None:
        shared = pending[0][0].experiment
        name = store_image(out, image_name(shared.model, as_config(shared.task), group[0].group), pixels)
    prompts: dict[tuple[str, ...], Mapping[str, Any]] = {}

    def prepare_text(questions: Sequence[str]) -> Mapping[str, Any]:
        """Return the text inputs of a batch, shared by all settings, since the processor also processes the pixels."""
        key = tuple(questions)
        if key not in prompts:
            prompts[key] = model_inputs(model, processor, image, questions, group[0].group)
        return prompts[key]

    for setting, file, missing in pending:
        for batch in _batches(group, setting.experiment.batch_size):
            missing_ids = {sample.id for sample in missing} & {sample.id for sample in batch}
            if not missing_ids:
                continue
            selections: Sequence[Selection | None]
            try:
                before = passes[0]
                text = prepare_text([setting.experiment.task.prompt(sample) for sample in batch])
                records, selections = _answer(adapter, processor, setting.experiment, text, batch, encoding, encode_ms)
            except Exception as error:
                records, selections = [_error_record(sample, error) for sample in batch], [None] * len(batch)
            progress.more_encodes += passes[0] - before
            for record, selection in zip(records, selections, strict=True):
                record["stored_image"] = name
                record["selection"] = (
                    selection_to_record(selection) if name is not None and selection is not None else None
                )
                if record["sample"] in missing_ids:
                    yield setting, file, record, selection


def _batches(group: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Split the samples of an image into batches; finished samples do not change the split."""
    return [group[start : start + size] for start in range(0, len(group), size)]


def _answer(
    adapter: Adapter,
    processor: Any,
    experiment: Experiment,
    text: Mapping[str, Any],
    batch: Sequence[Sample],
    encoding: Encoding,
    encode_ms: float,
) -> tuple[list[dict[str, Any]], list[Selection]]:
    """Return the records and the selections of a batch of questions about an encoded image."""
    pipeline = Pipeline(experiment.reducer, adapter, tokenizer=processor)
    torch.manual_seed(experiment.seed)
    with torch.no_grad():
        began = time.perf_counter()
        call = pipeline.prepare(text, generating=True, encoding=encoding.repeat(len(batch)))
        selected = time.perf_counter()
        sequences = pipeline.generate_prepared(call, text["input_ids"], **_generation_options(experiment))
        answers = processor.batch_decode(sequences[:, text["input_ids"].shape[1] :], skip_special_tokens=True)
        ended = time.perf_counter()
    records, run = [], pipeline.run
    for index, (sample, answer) in enumerate(zip(batch, answers, strict=True)):
        image, (full, short) = run.account.images[index], run.account.prompt_lengths[index]
        numbers = {
            "asked": image.asked,
            "kept": image.kept,
            "valid": image.valid,
            "kept_per_tile": list(image.kept_per_tile),
            "newlines": image.newlines,
            "prompt_length": short,
            "prompt_length_full": full,
            "encode_ms": round(encode_ms, 3),
            "select_ms": round((selected - began) * 1000 / len(batch), 3),
            "generate_ms": round((ended - selected) * 1000 / len(batch), 3),
        }
        score = experiment.task.score(sample, answer.strip())
        records.append(_make_record(sample, answer.strip(), score, numbers))
    return records, run.selections


def _generation_options(experiment: Experiment) -> dict[str, Any]:
    """Return the arguments of `generate`. If the task sets generation options, they replace the experiment's."""
    if options := experiment.task.generation():
        return dict(options)
    sampling: dict[str, Any] = {"do_sample": False}
    if experiment.temperature > 0:
        sampling = {"do_sample": True, "temperature": experiment.temperature}
    return {"max_new_tokens": experiment.max_new_tokens, **sampling}


EMPTY_NUMBERS: Mapping[str, Any] = {
    **dict.fromkeys(("asked", "kept", "valid"), 0),
    "kept_per_tile": [],
    **dict.fromkeys(("newlines", "prompt_length", "prompt_length_full"), 0),
    **dict.fromkeys(("encode_ms", "select_ms", "generate_ms"), 0.0),
}
"""The numbers of a sample that failed."""


def _error_record(sample: Sample, error: Exception) -> dict[str, Any]:
    """Return the record of a sample that failed."""
    return _make_record(sample, "", 0.0, EMPTY_NUMBERS, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _make_record(
    sample: Sample, prediction: str, score: float, numbers: Mapping[str, Any], error: str | None = None
) -> dict[str, Any]:
    """Return the record of a sample: question, answers, prediction, score and the numbers of the run."""
    return {
        "sample": sample.id,
        "group": sample.group,
        "question": sample.question,
        "answer": sample.answers[0] if len(sample.answers) == 1 else list(sample.answers),
        "prediction": prediction,
        "score": score,
        "correct": score >= 0.5,
        "type": sample.type,
        "split": sample.split,
        **numbers,
        "image": sample.group,
        "error": error,
        "stored_image": None,
        "selection": None,
    }
