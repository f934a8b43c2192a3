"""Identifies the model files, code, library versions and samples of records, so that a run never mixes states.

A configuration names a model, a data set and a strategy file, but not their content. Each folder of an experiment
therefore holds ``identity.json``, and each record holds a digest of its sample. If either differs from the present
state, the run stops.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokenprune.dependencies import read_version
from tokenprune.experiments.evaluation.hashing import FileState, file_state, hash_file
from tokenprune.experiments.evaluation.loading import find_checkpoint, is_hub_snapshot
from tokenprune.experiments.evaluation.records import list_record_files, read_lines, write_atomically
from tokenprune.experiments.evaluation.tasks.base import Sample

if TYPE_CHECKING:
    from tokenprune.experiments.evaluation.experiment import Experiment

NAME = "identity.json"
LAYOUT = 2
"""Version of the content of ``identity.json``."""
LIBRARIES = ("tokenprune", "torch", "torchvision", "transformers", "tokenizers", "timm", "numpy", "pillow")
"""Packages whose version can change an answer."""
SUFFIXES = frozenset({".safetensors", ".bin", ".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"})
"""Suffixes of the checkpoint files that can be read when a model or its processor is loaded."""
TRAINING_FILES = frozenset({"all_results.json", "eval_results.json", "train_results.json", "trainer_state.json"})
"""Files that a training run writes into a checkpoint folder, and that loading a model does not read."""
PACKAGE = "tokenprune"
LISTED = 5
"""Largest number of samples or files that an error lists by name."""
REMEDY = "Old and new records are never mixed: add --fresh to discard the old ones and run again, or give another --out"
COMPARED = {"question": "question", "answer": "answers", "type": "type", "split": "split", "group": "image name"}
"""Fields of a record that repeat its sample, and their names in errors."""


class IdentityError(ValueError):
    """Raised if the records of a run directory belong to another model, data set, code or library version."""


# --- files ------------------------------------------------------------------------------------------------------------


def checkpoint_states(folder: Path, previous: Mapping[str, FileState]) -> dict[str, FileState]:
    """Return the state of each file that loading a checkpoint can read, by file name.

    Subfolders are skipped: training runs keep other checkpoints there. ``.bin`` files are skipped if the folder has
    safetensors, as transformers does.

    Args:
        folder: the folder.
        previous: earlier states by name.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
    has_safetensors = any(path.suffix == ".safetensors" for path in paths)
    paths = [
        path for path in paths if path.name not in TRAINING_FILES and not (path.suffix == ".bin" and has_safetensors)
    ]
    with ThreadPoolExecutor(max_workers=8) as pool:
        states = pool.map(lambda path: file_state(path, previous.get(path.name)), paths)
        return {path.name: state for path, state in zip(paths, states, strict=True)}


# --- code -------------------------------------------------------------------------------------------------------------


def _classes_in(value: Any) -> Iterator[type]:
    """Yield the classes of a configuration and their bases, nested parameters included."""
    if is_dataclass(value) and not isinstance(value, type):
        yield from type(value).__mro__
        for field in fields(value):
            yield from _classes_in(getattr(value, field.name, None))
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _classes_in(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _classes_in(entry)


def _is_shipped(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def _source_of(module: ModuleType | None) -> Path | None:
    """Return the Python file of a module; None for built-in modules and interactive sessions."""
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name and name.endswith(".py") and Path(name).is_file() else None


def _add_imports(path: Path, module: ModuleType, files: set[Path]) -> None:
    """Add a user's file to `files`, and each file below its folder that it imports from, recursively."""
    if path in files:
        return
    files.add(path)
    for value in list(vars(module).values()):
        imported = value if inspect.ismodule(value) else sys.modules.get(str(getattr(value, "__module__", "")))
        source = _source_of(imported)
        if (
            imported is not None
            and source is not None
            and not _is_shipped(imported.__name__)
            and source.is_relative_to(path.parent)
            and "site-packages" not in source.relative_to(path.parent).parts
        ):
            _add_imports(source, imported, files)


def code_hashes(experiment: Experiment) -> dict[str, str]:
    """Return the hash of each file of code outside the package that an experiment runs, by file name.

    These are the plug-ins, the modules of the strategy, its components and the task, the files below the folder of
    such a module that it imports from, and `Task.files`. The standard library is skipped.

    Args:
        experiment: the experiment.
    """
    modules = {kind.__module__ for kind in _classes_in(experiment)}
    plugins = {Path(plugin).expanduser().resolve() for plugin in experiment.plugin}
    modules |= {name for name, module in list(sys.modules.items()) if _source_of(module) in plugins}
    files: set[Path] = set()
    for name in sorted(modules):
        source = _source_of(sys.modules.get(name))
        is_standard = name.partition(".")[0] in sys.stdlib_module_names
        if source is not None and not _is_shipped(name) and (source in plugins or not is_standard):
            _add_imports(source, sys.modules[name], files)
    files |= plugins | {path.resolve() for path in experiment.task.files()}
    names = [path.name for path in files]
    return {path.name if names.count(path.name) == 1 else str(path): hash_file(path) for path in sorted(files)}


# --- identity of a run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """The model files, code and versions that the records of an experiment depend on, besides its configuration.

    Args:
        versions: library versions by package.
        code: hashes of files of code outside the package, by name.
        checkpoints: the states of the files of each model folder, by model name and file name.
        commits: the commit of each model from the hub, by model name.
    """

    versions: Mapping[str, str]
    code: Mapping[str, str]
    checkpoints: Mapping[str, Mapping[str, FileState]]
    commits: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Identity | None:
        """Return the identity in an experiment's folder; None if it is missing, damaged or has another layout."""
        path = folder / NAME
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            if content.pop("layout", None) != LAYOUT:
                return None
            content["checkpoints"] = {
                model: {name: FileState(**state) for name, state in files.items()}
                for model, files in content["checkpoints"].items()
            }
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged: treated as missing
            return None

    def write(self, folder: Path) -> None:
        """Write the identity into an experiment's folder."""
        write_atomically(folder / NAME, json.dumps({"layout": LAYOUT, **asdict(self)}, indent=1))

    def changes_since(self, old: Identity) -> list[str]:
        """Return one phrase for each difference from an older identity; empty if the records of both can be mixed.

        Args:
            old: the older identity.
        """
        changes = [
            f"{package} {old.versions.get(package, 'not installed')} -> {self.versions.get(package, 'not installed')}"
            for package in sorted({*old.versions, *self.versions})
            if old.versions.get(package) != self.versions.get(package)
        ]
        changes += [f"the code in {phrase}" for phrase in _differences(old.code, self.code)]
        for model in sorted({*old.commits, *self.commits}):
            before, after = old.commits.get(model, "a folder"), self.commits.get(model, "a folder")
            if before != after:
                changes.append(f"the weights of {model}: {before} -> {after}")
        for model in sorted({*old.checkpoints, *self.checkpoints} - {*old.commits, *self.commits}):
            files = [
                {name: state.sha256 for name, state in identity.checkpoints.get(model, {}).items()}
                for identity in (old, self)
            ]
            if phrases := _differences(*files):
                changes.append(f"the weights or configuration of {model}: {_format_list(phrases)}")
        return changes


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return one phrase for each name that is new, missing or has another hash."""
    phrases = []
    for name in sorted({*old, *new}):
        if name not in old:
            phrases.append(f"{name} is new")
        elif name not in new:
            phrases.append(f"{name} is missing")
        elif old[name] != new[name]:
            phrases.append(f"{name} changed")
    return phrases


def _format_list(phrases: Sequence[str]) -> str:
    omitted = len(phrases) - LISTED
    return ", ".join(phrases[:LISTED]) + (f" and {omitted} more" if omitted > 0 else "")


def library_versions(packages: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Return the version of each installed package, by package name.

    Args:
        packages: names of the packages.
    """
    return {package: version for package in packages if (version := read_version(package)) is not None}


def find_model_folders(experiment: Experiment) -> dict[str, Path]:
    """Return the folder of each model that an experiment loads, by model name.

    These are the model, the text model of the strategy, and the base model of a PEFT adapter folder.

    Args:
        experiment: the experiment.

    Raises:
        ValueError: if a model cannot be found.
    """
    folders = {experiment.model: find_checkpoint(experiment.model)}
    config = folders[experiment.model] / "adapter_config.json"
    if config.is_file() and (base := json.loads(config.read_text()).get("base_model_name_or_path")):
        folders[f"base model {base}"] = find_checkpoint(base)
    if (text_model := experiment.reducer.text_model) is not None:
        folders[f"text_model {text_model}"] = find_checkpoint(text_model, "text_model")
    return folders


def compute_identity(experiment: Experiment, previous: Identity | None = None) -> Identity:
    """Return the present identity of an experiment.

    Args:
        experiment: the experiment.
        previous: an earlier identity; files with equal size and times are not read again.

    Raises:
        ValueError: if a model cannot be found.
    """
    checkpoints: dict[str, Mapping[str, FileState]] = {}
    commits: dict[str, str] = {}
    for name, folder in find_model_folders(experiment).items():
        if is_hub_snapshot(folder):
            commits[name] = folder.name
        else:
            previous_states = previous.checkpoints.get(name, {}) if previous is not None else {}
            checkpoints[name] = checkpoint_states(folder, previous_states)
    versions = library_versions((*LIBRARIES, *experiment.task.packages))
    return Identity(versions, code_hashes(experiment), checkpoints, commits)


# --- identity of a sample ---------------------------------------------------------------------------------------------


def image_digest(sample: Sample) -> str | None:
    """Return a hash of the image of a sample: of the file if the task provides `content`, otherwise of the pixels.

    Args:
        sample: the sample.

    Returns:
        The hash; None if the image cannot be read. The record of the sample then holds the error.
    """
    try:
        if sample.content is not None:
            return sample.content()
        image = sample.image()
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
    except Exception:  # a task may open its images in any way; the run stores the error in the record
        return None


class SampleDigests:
    """Short digests of the content of samples, computed on access; one image is hashed per group.

    Args:
        samples: all samples of a task.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = {sample.id: sample for sample in samples}
        self._first: dict[str, Sample] = {}
        for sample in samples:
            self._first.setdefault(sample.group, sample)
        self._images: dict[str, str | None] = {}

    def __getitem__(self, name: str) -> str:
        """Return the digest of a sample, 16 hexadecimal digits.

        Args:
            name: id of the sample.
        """
        sample = self.samples[name]
        if sample.group not in self._images:
            self._images[sample.group] = image_digest(self._first[sample.group])
        content = [sample.question, sample.answers, sample.type, sample.split, sample.group]
        text = json.dumps([*content, self._images[sample.group]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def changes_in(self, records: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return phrases for the records whose sample changed or was removed from the task; empty if there are none.

        Args:
            records: the records.
        """
        changed: list[str] = []
        failed, missing = 0, []
        for record in records:
            name = record["sample"]
            if name not in self.samples:
                missing.append(f"{name} ({record.get('question', '')!r})")
            elif record.get("sample_digest") != self[name]:
                changed.append(f"{name} ({', '.join(self._changed_fields(record))})")
                failed += record.get("error") is not None
        phrases = []
        if changed:
            hint = ", which failed before (--retry-errors runs failed samples again)" if failed == len(changed) else ""
            phrases.append(f"{_format_count(len(changed), 'sample')} changed: {_format_list(changed)}{hint}")
        if missing:
            phrases.append(f"{_format_count(len(missing), 'sample')} left the data set: {_format_list(missing)}")
        return phrases

    def _changed_fields(self, record: Mapping[str, Any]) -> list[str]:
        sample = self.samples[record["sample"]]
        answer = sample.answers[0] if len(sample.answers) == 1 else list(sample.answers)
        present = {"question": sample.question, "answer": answer, "type": sample.type, "split": sample.split}
        present["group"] = sample.group
        return [label for key, label in COMPARED.items() if record.get(key) != present[key]] or ["image"]


def _format_count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- run directories --------------------------------------------------------------------------------------------------


def has_records(folder: Path) -> bool:
    """Return whether an experiment's folder holds a record."""
    return any(True for path in list_record_files(folder) for _ in read_lines(path))


def check_identities(experiments: Mapping[Path, Experiment], out: Path, digests: SampleDigests) -> dict[Path, Identity]:
    """Return the present identity of each experiment, after a check that the records in its folder belong to it.

    Args:
        experiments: experiments that share a task, by records folder.
        out: the run directory.
        digests: the samples of the task.

    Raises:
        IdentityError: if a folder holds records of another identity; the error lists each change.
    """
    changes: list[str] = []
    identities: dict[Path, Identity] = {}
    stale = 0
    for folder, experiment in experiments.items():
        # Processes that share the samples write the identity before their first record: read it after the records.
        records = [record for path in list_record_files(folder) for record in read_lines(path)]
        old = Identity.read(folder)
        new = identities[folder] = compute_identity(experiment, old)
        if not records:
            continue
        if old is None:
            differences = ["they have no identity (an older version of tokenprune wrote them, or the file is damaged)"]
        else:
            differences = [*new.changes_since(old), *digests.changes_in(records)]
        stale += bool(differences)
        changes += differences
    if changes:
        settings = "" if len(experiments) == 1 else f" of {stale} of {len(experiments)} settings"
        summary = "; ".join(dict.fromkeys(changes))
        raise IdentityError(f"{out} holds records{settings} that do not belong to this run: {summary}. {REMEDY}")
    return identities
