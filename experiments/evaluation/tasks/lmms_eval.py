"""Runs tasks of lmms-eval in this package, with one model load and one encoding per image for all settings.

lmms-eval is an optional dependency that takes seconds to import, so the functions import it and the module does not.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.util
import inspect
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from PIL import Image

from tokenprune.experiments.evaluation.tasks.base import Sample, Task
from tokenprune.image_files import load_image

MODEL = "tokenprune"
"""Model name for the prompt templates of lmms-eval; it is the name of the plug-in, so that both use equal prompts."""
LONGEST = 1024
"""Default of `max_new_tokens`, as in lmms-eval's `llava_hf`."""
REASONING = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]
"""Tags of the reasoning that lmms-eval removes from answers by default."""


@dataclass
class LmmsTask(Task):
    """A free-answer task of lmms-eval (``generate_until``) with one image per question.

    Documents, images, prompts, generation options and scores come from lmms-eval. Requires the extra `lmms`.

    Args:
        name: name of the task in lmms-eval, e.g. ``textvqa_val``.
        limit: number of documents, from the first on, as lmms-eval's ``--limit``; by default all.
        score_by: the metric that scores a sample; by default the first metric that the task returns for it.
        full_score: score of a perfect answer. If it is set and the metric returns no number for a sample, the sample is
            aggregated as a list of one.
        type_by: column with the kind of question, for tables.
        generation_kwargs: generation options that override the task's options, e.g. ``{max_new_tokens: 32}``.
        data: folder with the data set of the task, as `datasets` saves it; by default the data set comes from the hub.
        include_path: folder with further tasks in lmms-eval's format.
    """

    packages: ClassVar[tuple[str, ...]] = ("lmms_eval",)

    name: str
    limit: int | None = None
    score_by: str | None = None
    full_score: float | None = None
    type_by: str | None = None
    generation_kwargs: dict[str, Any] | None = None
    data: str | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")
        if self.full_score is not None and self.full_score <= 0:
            raise ValueError(f"full_score={self.full_score} must be above 0")

    @property
    def metric(self) -> str:
        """Name of the mean score: the metric if its aggregation is the mean, otherwise ``NAME_mean_of_samples``."""
        metrics = {entry["metric"]: entry.get("aggregation") for entry in self._read_config()["metric_list"]}
        name = self.score_by or next(iter(metrics))
        return name if metrics[name] == "mean" else f"{self.name}_mean_of_samples"

    def check(self) -> None:
        """Raise a `ValueError` if lmms-eval or the task does not exist, or the task has an unsupported kind."""
        self._read_config()

    def files(self) -> Iterable[Path]:
        """Return the Python and YAML files below `include_path`, templates without an ending included."""
        if self.include_path is None:
            return ()
        paths = sorted(Path(self.include_path).expanduser().rglob("*"))
        return [path for path in paths if path.is_file() and path.name.endswith((".py", "yaml", ".yml"))]

    def samples(self) -> Iterator[Sample]:
        """Yield the documents as samples, with the samples of an image consecutive; opens every image once before."""
        task, documents = self._load_task(), self._load_task().eval_docs
        if self.type_by is not None and self.type_by not in task.features:
            raise ValueError(f"type_by={self.type_by!r}: {self.name} has no such column; it has {task.features}")
        samples, errors = [], []
        for index in range(min(self.limit or len(documents), len(documents))):
            group, question, question_type = f"{self.name}/document-{index}", "", ""
            answers: tuple[str, ...] = ()
            content: Callable[[], str] | None = None
            try:
                document = documents[index]
                image, question = _read_prompt(task, document)
                pixels = f"{image.mode} {image.size}".encode() + image.tobytes()
                digest = hashlib.sha256(pixels).hexdigest()
                group, content = f"{self.name}/{digest[:12]}", partial(str, digest)
                answers = _read_answers(task, document)
                question_type = "" if self.type_by is None else str(document[self.type_by])
            except Exception as error:  # the record of the sample holds the error; other samples run
                errors.append(f"document {index}: {_format_error(error)}")
            open_image = partial(self._read_image, index)
            samples.append(
                Sample(f"{self.name}/{index}", group, open_image, question, answers, question_type, content=content)
            )
        if len(errors) == len(samples):
            raise ValueError(
                f"{self.name}: no document can be used. {errors[0] if errors else 'There are no documents'}"
            )
        self._check_metric(samples[0])
        order = {group: index for index, group in reversed(list(enumerate(sample.group for sample in samples)))}
        yield from sorted(samples, key=lambda sample: order[sample.group])

    def generation(self) -> Mapping[str, Any]:
        """Return the arguments of `generate`, converted from the task's options as in lmms-eval's `llava_hf`."""
        task_options = self._merge_generation_options()
        beams, temperature = int(task_options.get("num_beams") or 1), float(task_options.get("temperature") or 0)
        options = {"max_new_tokens": int(task_options.get("max_new_tokens") or LONGEST), "num_beams": beams}
        if temperature > 0:
            return {**options, "do_sample": True, "temperature": temperature, "top_p": task_options.get("top_p")}
        return {**options, "do_sample": False}

    def score(self, sample: Sample, prediction: str) -> float:
        """Return the score of lmms-eval's metric for an answer, divided by the full score.

        Raises:
            ValueError: if the metric returns no number, or a number outside 0 to the full score.
        """
        return self._extract_score(self._compute_results(sample.id, prediction))

    def summary(self, predictions: Mapping[str, str]) -> dict[str, float | str]:
        """Return the task's metrics, aggregated by lmms-eval's own functions over all answers.

        If a metric cannot be aggregated, its value is the error message.
        """
        values: dict[str, list[Any]] = {}
        for sample, prediction in predictions.items():
            for metric, value in self._compute_results(sample, prediction).items():
                values.setdefault(metric, []).append(value)
        metrics: dict[str, float | str] = {}
        for metric, function in self._load_task().aggregation().items():
            if metric in values:
                try:
                    number = _aggregate(function, values[metric])
                except Exception as error:  # e.g. MME counts pairs, and a limit may cut one
                    metrics[metric] = _format_error(error)
                else:  # metrics that only write a submission file return no number
                    metrics |= {metric: float(number)} if isinstance(number, int | float) else {}
        return metrics

    def _read_config(self) -> dict[str, Any]:
        config = _load_config(self.name, self.include_path)
        metrics = [entry["metric"] for entry in config["metric_list"]]
        if self.score_by is not None and self.score_by not in metrics:
            raise ValueError(f"score_by={self.score_by!r} is no metric of {self.name}; it has {', '.join(metrics)}")
        return config

    def _load_task(self) -> Any:
        self.check()
        return load_task(self.name, self.include_path, self.data)

    def _merge_generation_options(self) -> dict[str, Any]:
        config = self._read_config()
        model_options = (config.get("model_specific_generation_kwargs") or {}).get("default") or {}
        return {**(config.get("generation_kwargs") or {}), **model_options, **(self.generation_kwargs or {})}

    def _read_image(self, index: int) -> Image.Image:
        return _read_prompt(self._load_task(), self._load_task().eval_docs[index])[0]

    def _compute_results(self, sample: str, prediction: str) -> dict[str, Any]:
        """Return the result of lmms-eval's `process_results` for an answer, by metric."""
        from lmms_eval.api.instance import Instance  # type: ignore[import-not-found]
        from lmms_eval.api.reasoning import (  # type: ignore[import-not-found]
            parse_reasoning_tags_config,
            strip_reasoning_tags,
        )

        task, index = self._load_task(), int(sample.rpartition("/")[2])
        until = self._merge_generation_options().get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            prediction = prediction.split(stop)[0] if stop else prediction
        # Without media, as in lmms-eval. The document is read again on each call, since some metrics write into it.
        document = task.eval_docs_no_media[index]
        metadata = {"task": self.name, "doc_id": index, "repeats": 1}
        answer = Instance("generate_until", (sample,), 0, metadata, resps=[prediction], doc=document)
        task._filters[0].apply([answer], task.task_docs)
        response = answer.filtered_resps[task._filters[0].name]
        tags = parse_reasoning_tags_config(cli_value=REASONING, task_value=task.config.reasoning_tags)
        if tags is not None and isinstance(response, str):
            response = strip_reasoning_tags(response, tags)
        extra = {"full_docs": task.eval_docs_no_media} if task.config.full_docs else {}
        with redirect_stdout(io.StringIO()):
            results: dict[str, Any] = task.process_results(document, [response], **extra)
        return results

    def _extract_score(self, results: Mapping[str, Any]) -> float:
        """Return the score in the results of a sample, from 0 to 1."""
        task = self._load_task()
        metrics = [self.score_by] if self.score_by else list(task.aggregation())
        name = next((metric for metric in metrics if metric in results), None)
        if name is None:
            raise ValueError(f"{self.name} returns no {' or '.join(metrics)} for this sample, only {list(results)}")
        value, key = results[name], task.config.score_key
        value = value[key] if isinstance(value, Mapping) and key in value else value
        if not isinstance(value, int | float) and self.full_score is not None:
            value = _aggregate(task.aggregation()[name], [results[name]])
        if not isinstance(value, int | float):
            raise ValueError(
                f"{self.name}: metric {name} gives no number for a single sample. Choose another metric by score_by "
                f"({', '.join(task.aggregation())}), or set full_score to the score of a perfect answer; then each "
                "sample is aggregated separately"
            )
        score = float(value) / (self.full_score or 1.0)
        if not 0 <= score <= 1:
            raise ValueError(
                f"{self.name}: metric {name} is {value:g} for a sample, but scores must be from 0 to 1; set full_score "
                "to the score of a perfect answer"
            )
        return score

    def _check_metric(self, sample: Sample) -> None:
        """Raise a `ValueError` before the run if the metric returns no number."""
        try:
            results = self._compute_results(sample.id, "")
        except Exception:  # some metrics do not accept an empty answer
            return
        self._extract_score(results)


def _format_error(error: BaseException) -> str:
    """Return an error as one line; for a retried call, the error of the last attempt."""
    attempt = getattr(error, "last_attempt", None)
    if attempt is not None:
        error = attempt.exception()
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@cache
def _load_manager(include_path: str | None) -> Any:
    """Return lmms-eval's task manager, which takes seconds to build."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError('LmmsTask needs lmms-eval, which is not installed here: pip install -e ".[lmms]" (about 7 GB)')
    from lmms_eval.tasks import TaskManager  # type: ignore[import-not-found]
    from loguru import logger  # type: ignore[import-not-found]

    logger.disable("lmms_eval")  # its hundreds of log lines would break the progress bar
    return TaskManager("ERROR", include_path=include_path, model_name=MODEL)


@cache
def _load_config(name: str, include_path: str | None) -> dict[str, Any]:
    """Return the configuration of a task, after a check that the task can be run here.

    Raises:
        ValueError: if there is no such task, or it has an unsupported kind; the error states the kind.
    """
    manager = _load_manager(include_path)
    from lmms_eval.utils import load_yaml_config  # type: ignore[import-not-found]

    if name not in manager.all_tasks:
        matches = difflib.get_close_matches(name, manager.all_subtasks, n=3)
        hint = f"; did you mean {' or '.join(matches)}?" if matches else "; `lmms_eval --tasks list` names them"
        raise ValueError(f"lmms-eval has no task {name!r}{hint}")
    entry = manager.task_index[name]
    if entry["type"] != "task":
        if entry["type"] == "python_task":
            raise ValueError(f"{name} is a task written as a class; only tasks of a YAML file can be run here")
        members = entry["task"]
        if entry["type"] == "group":
            members = load_yaml_config(entry["yaml_path"], mode="simple")["task"]
        raise ValueError(f"{name} is a group of tasks; name one of them: {', '.join(map(str, members))}")
    try:
        config: dict[str, Any] = load_yaml_config(entry["yaml_path"], mode="full")
    except Exception as error:
        raise ValueError(f"{name} cannot be loaded by lmms-eval: {_format_error(error)}") from error
    kind = config.get("output_type", "generate_until")
    if kind != "generate_until":
        raise ValueError(
            f"{name} is a {kind} task. Only generate_until can be run here: likelihoods of given answers are not "
            "computed, and one question gets one answer"
        )
    for key, maximum in (("num_fewshot", 0), ("repeats", 1)):
        if (config.get(key) or maximum) > maximum:
            raise ValueError(f"{name} has {key}={config[key]}; only {maximum} can be run here")
    config.setdefault("metric_list", [{"metric": "exact_match", "aggregation": "mean"}])
    return config


@cache
def load_task(name: str, include_path: str | None = None, data: str | None = None) -> Any:
    """Return lmms-eval's task with its data.

    Args:
        name: name of the task.
        include_path: folder with further tasks.
        data: folder with the data set of the task; by default the data set comes from the hub.

    Raises:
        ValueError: if the data cannot be loaded.
    """
    from lmms_eval.api.task import ConfigurableMessagesTask  # type: ignore[import-not-found]

    config = copy.deepcopy(_load_config(name, include_path))  # lmms-eval writes into it
    if data is not None:
        source_options = {"dataset_path": data, "dataset_kwargs": {"load_from_disk": True}}
        config |= {**source_options, "dataset_name": None, "process_docs": None}
    try:
        return ConfigurableMessagesTask(config=config, model_name=MODEL)
    except Exception as error:
        source = data or "/".join(filter(None, (config.get("dataset_path"), config.get("dataset_name"))))
        raise ValueError(
            f"the data of {name} ({source}) cannot be loaded: {_format_error(error)}. It comes from the hub (some "
            "data sets require `hf auth login`), or from a folder if you set the option data"
        ) from error


def _read_prompt(task: Any, document: Any) -> tuple[Image.Image, str]:
    """Return the image and the text of a document, from the chat messages of lmms-eval.

    Raises:
        ValueError: if the messages are not exactly one image before one text.
    """
    messages = task.doc_to_messages(document)
    parts = [(message["role"], part) for message in messages for part in message["content"]]
    kinds = [f"{role} {part['type']}" for role, part in parts]
    if kinds != ["user image", "user text"]:
        raise ValueError(f"it has {', '.join(kinds) or 'no content'}; a document must have one image before one text")
    image = parts[0][1]["url"]
    return image if isinstance(image, Image.Image) else load_image(str(image)), parts[1][1]["text"]


def _read_answers(task: Any, document: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the accepted answers for the records; the metric reads the document instead."""
    target = task.doc_to_target(document)
    if target == task.config.doc_to_target and target not in document:
        target = document.get(f"{target}s", target)  # VQAv2 and TextVQA name a column that does not exist
    entries = target if isinstance(target, list) else [target]
    return tuple(dict.fromkeys(str(entry["answer"] if isinstance(entry, Mapping) else entry) for entry in entries))


def _aggregate(function: Callable[..., Any], values: Sequence[Any]) -> Any:
    """Return the result of an aggregation function of lmms-eval for the values of several samples."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), _restore_globals(function):
        parameters = inspect.signature(function).parameters
        extra = {"args": SimpleNamespace(output_path=folder)} if "args" in parameters else {}
        return function(list(values), **extra)


@contextmanager
def _restore_globals(function: Callable[..., Any]) -> Iterator[None]:
    """Restore the global variables of a function's module after the block: OCRBench adds counts to a global."""
    variables = getattr(inspect.unwrap(function), "__globals__", {})
    before = {name: copy.copy(value) for name, value in variables.items() if isinstance(value, dict | list)}
    try:
        yield
    finally:
        variables.update(before)
