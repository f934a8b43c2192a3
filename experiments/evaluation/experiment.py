"""One experiment: model x reducer x task x seed -> records. Several of them share each image's encoding."""

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
    has_records,
    model_folders,
)
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.experiments.evaluation.records import (
    NAME,
    RecordFile,
    discard,
    files_of,
    join,
    merge,
    read_lines,
    write_whole,
)
from tokenprune.experiments.evaluation.stored_images import (
    IMAGES,
    image_name,
    in_record,
    is_stored,
    store,
    with_pixels,
)
from tokenprune.experiments.evaluation.tasks import Boards, Sample, Task
from tokenprune.pipeline import Pipeline, attention_name, counted_encodes, missing_signals
from tokenprune.policies import Configurable
from tokenprune.reducer import TokenReducer
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED

WATCHED = 4
"""So many images of a run keep their pixels for those who watch it."""


@dataclass
class Experiment(Configurable):
    """One setting that gives one number, and the records behind it.

    Args:
        model: ``mini`` (embedded), a checkpoint folder, or a hub id.
        reducer: the strategy.
        task: the task.
        seed: seed of sampling; without effect while answers are greedy.
        max_new_tokens: longest answer in tokens, unless the task says it (`LmmsTask` does).
        temperature: of sampling; 0 answers greedily; unless the task says it.
        batch_size: questions about one image that are answered together. A crash loses at most one batch.
        dtype: ``auto`` (float32 on a CPU) or the name of a torch dtype.
        device: ``auto`` or a torch device; no part of what identifies an experiment.
        plugin: Python files whose classes get known by name.
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
        """Check the options once."""
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def config(self) -> dict[str, Any]:
        """Return everything as nested plain data that the command line reads again."""
        return {one.name: as_config(getattr(self, one.name)) for one in fields(self)}

    def hash(self) -> str:
        """Return 12 letters that identify the setting, whatever the order of keys and whether defaults were written."""
        identity = {name: value for name, value in self.config().items() if name not in ("device", "plugin")}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Setting:
    """One experiment of a grid, with what the tables call it.

    Args:
        experiment: the experiment.
        name: for tables and progress.
        role: ``"grid"``, ``"full"`` (all tokens) or ``"baseline"``.
        factors: the varied options and their values in words.
    """

    experiment: Experiment
    name: str
    role: str = "grid"
    factors: Mapping[str, Any] = field(default_factory=dict)

    def folder(self, out: Path) -> Path:
        """Return the folder of the records."""
        return out / "settings" / self.experiment.hash()

    def describe(self) -> dict[str, Any]:
        """Return what ``setting.json`` says."""
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


Watch = Callable[[Setting, Mapping[str, Any], Selection | None], None]
"""Is given a setting, a record of it, and the selection behind the record unless the sample failed."""


@dataclass
class Progress:
    """How far a run has come.

    Args:
        total: records that all settings will have.
        done: records that are there.
        errors: records of samples that failed, those of earlier runs included.
        images: images that were encoded.
        encodes: passes through the vision tower that encoded them, counted at the tower; 0 if the adapter names none.
        more_encodes: passes through it while answering, by strategies that encode at another resolution.
        setting: name of the setting that wrote last.
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
    tell: Callable[[Progress], None] = lambda progress: None,
    watch: Watch | None = None,
    images: int = IMAGES,
) -> Progress:
    """Run experiments that share model and task; what has a record already is not done again.

    Every image is encoded once, with the signals that all settings together need; only the LLM runs again.

    Args:
        settings: the experiments; they differ in reducer and seed only.
        out: the run directory.
        rank: number of this process among those that share the samples.
        world: number of these processes.
        tell: is told after every record.
        watch: is given every record and the selection behind it, which carries pixels for the first few images.
        images: so many images are stored in the run directory, with the kept tokens in their records, for reports;
            evenly spread over the task.

    Returns:
        What was done; `Progress.errors` counts samples that have an error record.

    Raises:
        ValueError: if the settings do not share model and task, two samples have one id, the model cannot be had, or it
            lacks a signal.
        InUseError: if another process writes the same records.
        IdentityError: if there are records of another model, data set, code or library version.
    """
    shared = settings[0].experiment
    for setting in settings:
        one = setting.experiment
        if (one.model, one.dtype, as_config(one.task)) != (shared.model, shared.dtype, as_config(shared.task)):
            raise ValueError("settings that run together must share model, dtype and task")
    if len({setting.experiment.reducer.text_model for setting in settings} - {None}) > 1:
        raise ValueError("settings that run together must share reducer.text_model")
    samples = list(shared.task.samples())
    if twice := [name for name, number in Counter(sample.id for sample in samples).items() if number > 1]:
        raise ValueError(f"{type(shared.task).__name__}: several samples have the id {twice[0]!r}; ids must differ")
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.group)]
    mine = groups[rank::world]
    with ExitStack() as stack:
        files = []
        for setting in settings:
            files.append(stack.enter_context(RecordFile(setting.folder(out), rank if world > 1 else None)))
        digests = SampleDigests(samples)
        identities = check_identities({setting.folder(out): setting.experiment for setting in settings}, out, digests)
        for setting in settings:
            _write_config(setting, out)
            identities[setting.folder(out)].write(setting.folder(out))
        wanted = {sample.id for group in mine for sample in group}
        progress = Progress(len(wanted) * len(settings), sum(len(wanted & file.done) for file in files))
        progress.errors = sum(len(wanted & file.failed) for file in files)
        tell(progress)
        if progress.done < progress.total:
            device = _device(shared.device, rank)
            model, processor = load(shared.model, device, shared.dtype)
            if wrong := lacking(model, settings):
                raise ValueError("these settings cannot run:\n  " + "\n  ".join(wrong))
            adapter, around = find_adapter(model), environment(model)
            for setting in settings:
                attention = attention_name(setting.experiment.reducer, adapter)
                read = {} if attention is None else {"attention": attention}
                write_whole(setting.folder(out) / "environment.json", json.dumps({**around, **read}, indent=1))
            passes = stack.enter_context(counted_encodes(adapter))
            for number, group in list(enumerate(groups))[rank::world]:
                pending = [
                    (c, f, [s for s in group if s.id not in f.done]) for c, f in zip(settings, files, strict=True)
                ]
                keep = out if is_stored(number, len(groups), images) else None
                watched = watch is not None and progress.images < WATCHED
                for setting, file, record, selection in _records(
                    adapter, processor, group, pending, progress, keep, watched, passes
                ):
                    record["sample_digest"] = digests[record["sample"]]
                    file.add(record)
                    _count(progress, setting, record)
                    if watch is not None:
                        watch(setting, record, selection)
                    tell(progress)
        if world == 1:
            for setting in settings:
                merge(setting.folder(out), [sample.id for sample in samples])
    if world > 1:
        for setting in settings:
            join(setting.folder(out), [sample.id for sample in samples])
    for setting in settings:
        _summarize(setting, out)
    return progress


def check_records(settings: Sequence[Setting], out: Path) -> None:
    """Check before anything runs that the records in a run directory belong to the present model, data and code.

    Args:
        settings: experiments that share model and task.
        out: the run directory.

    Raises:
        IdentityError: if records belong to others; the error names each change.
    """
    if any(has_records(setting.folder(out)) for setting in settings):
        digests = SampleDigests(list(settings[0].experiment.task.samples()))
        check_identities({setting.folder(out): setting.experiment for setting in settings}, out, digests)


def discard_records(settings: Sequence[Setting], out: Path) -> None:
    """Discard the records of experiments, once their data and models are known to be there to run them again.

    Args:
        settings: the experiments.
        out: the run directory.

    Raises:
        ValueError: if the data of a task or a model cannot be found; all records stay.
        InUseError: if another process has the records open.
    """
    for task in {
        json.dumps(as_config(setting.experiment.task)): setting.experiment.task for setting in settings
    }.values():
        task.check()
    for setting in settings:
        model_folders(setting.experiment)
    for setting in settings:
        discard(setting.folder(out))


def _summarize(setting: Setting, out: Path) -> None:
    """Write ``summary.json``: what only all answers together tell, if the task has such numbers."""
    folder = setting.folder(out)
    if files_of(folder) != [folder / NAME]:  # another process still writes its part
        return
    records = read_lines(folder / NAME)
    answers = {record["sample"]: record["prediction"] for record in records if record["error"] is None}
    file = folder / "summary.json"
    if file.is_file() and json.loads(file.read_text())["answers"] == len(answers):
        return
    if numbers := setting.experiment.task.summary(answers):
        write_whole(file, json.dumps({"answers": len(answers), "metrics": numbers}, indent=1))


def _count(progress: Progress, setting: Setting, record: Mapping[str, Any]) -> None:
    total, number = progress.scores.get(setting.name, (0.0, 0))
    progress.scores[setting.name] = (total + record["score"], number + 1)
    progress.done += 1
    progress.errors += record["error"] is not None
    progress.setting = setting.name


def rank_and_world() -> tuple[int, int]:
    """Return number and count of the processes that share the work, as torchrun and accelerate say them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _device(name: str, rank: int) -> str:
    return f"cuda:{rank % torch.cuda.device_count()}" if name == "auto" and torch.cuda.is_available() else name


def _write_config(setting: Setting, out: Path) -> None:
    folder = setting.folder(out)
    if not (folder / "setting.json").is_file():
        write_whole(folder / "config.yaml", yaml.safe_dump(setting.experiment.config(), sort_keys=False))
        write_whole(folder / "setting.json", json.dumps(setting.describe(), indent=1))


def lacking(model: Any, settings: Sequence[Setting]) -> list[str]:
    """Return one line for every setting whose strategy needs what the model cannot give.

    Args:
        model: the model; its weights are not read.
        settings: experiments with this model.
    """
    adapter, wrong = find_adapter(model), []
    for setting in settings:
        reducer = setting.experiment.reducer
        if missing := missing_signals(reducer, adapter):
            wrong.append(f"{setting.name}: {type(model).__name__} gives no {', '.join(missing)}")
        elif reducer.reads_question and reducer.text_model is None:
            wrong.append(f"{setting.name}: reads the question; set reducer.text_model")
    return wrong


def environment(model: Any) -> dict[str, Any]:
    """Return versions, device and commit, as ``environment.json`` says them."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    device = str(model.device)
    return {
        **{package: of(package) for package in LIBRARIES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(model.device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Return the commit of this code, with `-dirty` if files were changed since; None outside a checkout of it."""
    place = Path(__file__).resolve().parent
    try:
        # An installed copy may lie in a checkout of something else, whose commit would say nothing.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=place, capture_output=True, check=True)
        said = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(said, cwd=place, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


Pending = tuple[Setting, RecordFile, list[Sample]]


def _records(
    adapter: Adapter,
    processor: Any,
    group: Sequence[Sample],
    pending: Sequence[Pending],
    progress: Progress,
    out: Path | None,
    watched: bool,
    passes: Sequence[int],
) -> Iterator[tuple[Setting, RecordFile, dict[str, Any], Selection | None]]:
    """Yield the missing records of all settings for one image, encoded once, and stored if `out` is a run directory."""
    if not any(missing for _, _, missing in pending):
        return
    text_model = next((c.experiment.reducer.text_model for c, _, _ in pending if c.experiment.reducer.text_model), None)
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
        if out is not None or watched:  # not while the clock runs
            encoding = with_pixels(encoding, adapter, inputs)
    except Exception as error:  # one bad image must not end a night's run
        for setting, file, missing in pending:
            for sample in missing:
                yield setting, file, _failed(sample, error), None
        return
    progress.images += 1
    progress.encodes += passes[0] - before
    name, pixels = None, encoding.images[0].pixels
    if out is not None and pixels is not None:
        shared = pending[0][0].experiment
        name = store(out, image_name(shared.model, as_config(shared.task), group[0].group), pixels)
    prompts: dict[tuple[str, ...], Mapping[str, Any]] = {}

    def text_of(questions: Sequence[str]) -> Mapping[str, Any]:
        """Return the text inputs of a batch; the processor goes over the pixels too, so all settings share them."""
        key = tuple(questions)
        if key not in prompts:
            prompts[key] = model_inputs(model, processor, image, questions, group[0].group)
        return prompts[key]

    for setting, file, missing in pending:
        for batch in _batches(group, setting.experiment.batch_size):
            due = {sample.id for sample in missing} & {sample.id for sample in batch}
            if not due:
                continue
            selections: Sequence[Selection | None]
            try:
                before = passes[0]
                text = text_of([setting.experiment.task.prompt(sample) for sample in batch])
                records, selections = _answer(adapter, processor, setting.experiment, text, batch, encoding, encode_ms)
            except Exception as error:
                records, selections = [_failed(sample, error) for sample in batch], [None] * len(batch)
            progress.more_encodes += passes[0] - before
            for record, selection in zip(records, selections, strict=True):
                record["stored_image"] = name
                record["selection"] = in_record(selection) if name is not None and selection is not None else None
                if record["sample"] in due:
                    yield setting, file, record, selection


def _batches(group: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Cut the samples of an image into batches, the same ones whatever is done already."""
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
    """Return the records of a batch of questions about an encoded image, and the selections behind them."""
    pipeline = Pipeline(experiment.reducer, adapter, tokenizer=processor)
    torch.manual_seed(experiment.seed)
    with torch.no_grad():
        began = time.perf_counter()
        call = pipeline.prepare(text, generating=True, encoding=encoding.repeated(len(batch)))
        chosen = time.perf_counter()
        sequences = pipeline.generate_prepared(call, text["input_ids"], **_options(experiment))
        answers = processor.batch_decode(sequences[:, text["input_ids"].shape[1] :], skip_special_tokens=True)
        ended = time.perf_counter()
    records, run = [], pipeline.run
    for place, (sample, answer) in enumerate(zip(batch, answers, strict=True)):
        image, (full, short) = run.account.images[place], run.account.prompt_lengths[place]
        numbers = {
            "asked": image.asked,
            "kept": image.kept,
            "valid": image.valid,
            "kept_per_tile": list(image.kept_per_tile),
            "newlines": image.newlines,
            "prompt_length": short,
            "prompt_length_full": full,
            "encode_ms": round(encode_ms, 3),
            "select_ms": round((chosen - began) * 1000 / len(batch), 3),
            "generate_ms": round((ended - chosen) * 1000 / len(batch), 3),
        }
        score = experiment.task.score(sample, answer.strip())
        records.append(_record(sample, answer.strip(), score, numbers))
    return records, run.selections


def _options(experiment: Experiment) -> dict[str, Any]:
    """Return the arguments of `generate`: those of the task if it has any."""
    if own := experiment.task.generation():
        return dict(own)
    sampling: dict[str, Any] = {"do_sample": False}
    if experiment.temperature > 0:
        sampling = {"do_sample": True, "temperature": experiment.temperature}
    return {"max_new_tokens": experiment.max_new_tokens, **sampling}


NOTHING: Mapping[str, Any] = {
    **dict.fromkeys(("asked", "kept", "valid"), 0),
    "kept_per_tile": [],
    **dict.fromkeys(("newlines", "prompt_length", "prompt_length_full"), 0),
    **dict.fromkeys(("encode_ms", "select_ms", "generate_ms"), 0.0),
}
"""The numbers of a sample that could not be answered."""


def _failed(sample: Sample, error: Exception) -> dict[str, Any]:
    """Return the record of a sample that could not be answered."""
    return _record(sample, "", 0.0, NOTHING, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _record(
    sample: Sample, prediction: str, score: float, numbers: Mapping[str, Any], error: str | None = None
) -> dict[str, Any]:
    """Return the record of a sample: what was asked and answered, and the numbers of the run."""
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
