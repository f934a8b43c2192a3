"""lmms-eval's tasks, run by this package: one model load and one encoding an image for all settings.

lmms-eval is an optional dependency, and it takes seconds to import: nothing of it is imported at the head.
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
"""The name under which lmms-eval looks up prompts: that of our model in it, so that both ways ask the same."""
LONGEST = 1024
"""Tokens of an answer if the task does not say: what lmms-eval's `llava_hf` takes."""
REASONING = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]
"""What lmms-eval cuts out of answers unless the task says something else."""


@dataclass
class LmmsTask(Task):
    """A task of lmms-eval that is answered freely (``generate_until``) and shows one image a question.

    Documents, images, prompts, generation options and scores are lmms-eval's own. Needs the extra `lmms`.

    Args:
        name: name of the task in lmms-eval, e.g. ``textvqa_val``.
        limit: only the first documents, as lmms-eval's ``--limit``; all if left out.
        score_by: the metric that scores a sample; if left out, the first one that the task gives for it.
        full_score: what the metric gives a perfect answer. If it is given, a metric without a number for each sample is
            asked for one by aggregating that sample alone.
        type_by: column whose value is the kind of question, for tables.
        generation_kwargs: options of generation that replace the task's own, e.g. ``{max_new_tokens: 32}``.
        data: folder that holds the task's data set as `datasets` saves it; from the hub if left out.
        include_path: folder with tasks of your own in lmms-eval's format.
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
        """Check the options once."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")
        if self.full_score is not None and self.full_score <= 0:
            raise ValueError(f"full_score={self.full_score} must be above 0")

    @property
    def metric(self) -> str:
        """Name of what the scores of samples average to: the metric if its aggregation is the mean, else the task."""
        metrics = {one["metric"]: one.get("aggregation") for one in self._config()["metric_list"]}
        name = self.score_by or next(iter(metrics))
        return name if metrics[name] == "mean" else f"{self.name}_mean_of_samples"

    def check(self) -> None:
        """Raise a `ValueError` if lmms-eval or the task is not there, or it is of a kind that cannot be run."""
        self._config()

    def files(self) -> Iterable[Path]:
        """Return the Python and YAML files below `include_path`, templates without an ending included."""
        if self.include_path is None:
            return ()
        paths = sorted(Path(self.include_path).expanduser().rglob("*"))
        return [path for path in paths if path.is_file() and path.name.endswith((".py", "yaml", ".yml"))]

    def samples(self) -> Iterator[Sample]:
        """Yield the documents, those about one image together; every image is opened once for that."""
        task, documents = self._task(), self._task().eval_docs
        if self.type_by is not None and self.type_by not in task.features:
            raise ValueError(f"type_by={self.type_by!r}: {self.name} has no such column; it has {task.features}")
        rows, errors = [], []
        for place in range(min(self.limit or len(documents), len(documents))):
            group, question, kind = f"{self.name}/document-{place}", "", ""
            answers: tuple[str, ...] = ()
            content: Callable[[], str] | None = None
            try:
                document = documents[place]
                image, question = _asked(task, document)
                pixels = f"{image.mode} {image.size}".encode() + image.tobytes()
                digest = hashlib.sha256(pixels).hexdigest()
                group, content = f"{self.name}/{digest[:12]}", partial(str, digest)
                answers = _answers(task, document)
                kind = "" if self.type_by is None else str(document[self.type_by])
            except Exception as error:  # its record will say so; the others are asked
                errors.append(f"document {place}: {_said(error)}")
            opens = partial(self._image, place)
            rows.append(Sample(f"{self.name}/{place}", group, opens, question, answers, kind, content=content))
        if len(errors) == len(rows):
            raise ValueError(f"{self.name}: no document can be asked about. {errors[0] if errors else 'There is none'}")
        self._probe(rows[0])
        order = {group: place for place, group in reversed(list(enumerate(row.group for row in rows)))}
        yield from sorted(rows, key=lambda row: order[row.group])

    def generation(self) -> Mapping[str, Any]:
        """Return the arguments of `generate`, as lmms-eval's `llava_hf` makes them of the task's options."""
        own = self._generation()
        beams, temperature = int(own.get("num_beams") or 1), float(own.get("temperature") or 0)
        options = {"max_new_tokens": int(own.get("max_new_tokens") or LONGEST), "num_beams": beams}
        if temperature > 0:
            return {**options, "do_sample": True, "temperature": temperature, "top_p": own.get("top_p")}
        return {**options, "do_sample": False}

    def score(self, sample: Sample, prediction: str) -> float:
        """Return what lmms-eval's metric says of an answer, divided by the full score.

        Raises:
            ValueError: if it gives no number, or one that is not from 0 to the full score.
        """
        return self._number(self._results(sample.id, prediction))

    def summary(self, predictions: Mapping[str, str]) -> dict[str, float | str]:
        """Return the task's metrics, aggregated by lmms-eval's own functions over all answers.

        A metric that cannot be aggregated has the error for a value.
        """
        values: dict[str, list[Any]] = {}
        for sample, prediction in predictions.items():
            for metric, value in self._results(sample, prediction).items():
                values.setdefault(metric, []).append(value)
        found: dict[str, float | str] = {}
        for metric, function in self._task().aggregation().items():
            if metric in values:
                try:
                    number = _aggregated(function, values[metric])
                except Exception as error:  # e.g. MME counts pairs, and a limit may cut one
                    found[metric] = _said(error)
                else:  # those that write a file to be sent in give nothing
                    found |= {metric: float(number)} if isinstance(number, int | float) else {}
        return found

    def _config(self) -> dict[str, Any]:
        config = _config(self.name, self.include_path)
        metrics = [one["metric"] for one in config["metric_list"]]
        if self.score_by is not None and self.score_by not in metrics:
            raise ValueError(f"score_by={self.score_by!r} is no metric of {self.name}; it has {', '.join(metrics)}")
        return config

    def _task(self) -> Any:
        self.check()
        return loaded(self.name, self.include_path, self.data)

    def _generation(self) -> dict[str, Any]:
        config = self._config()
        of_model = (config.get("model_specific_generation_kwargs") or {}).get("default") or {}
        return {**(config.get("generation_kwargs") or {}), **of_model, **(self.generation_kwargs or {})}

    def _image(self, place: int) -> Image.Image:
        return _asked(self._task(), self._task().eval_docs[place])[0]

    def _results(self, sample: str, prediction: str) -> dict[str, Any]:
        """Return what lmms-eval's `process_results` says of an answer, by metric."""
        from lmms_eval.api.instance import Instance  # type: ignore[import-not-found]
        from lmms_eval.api.reasoning import (  # type: ignore[import-not-found]
            parse_reasoning_tags_config,
            strip_reasoning_tags,
        )

        task, place = self._task(), int(sample.rpartition("/")[2])
        until = self._generation().get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            prediction = prediction.split(stop)[0] if stop else prediction
        # Without media, as lmms-eval does it; and a new one each time, since some metrics write into it.
        document = task.eval_docs_no_media[place]
        about = {"task": self.name, "doc_id": place, "repeats": 1}
        answer = Instance("generate_until", (sample,), 0, about, resps=[prediction], doc=document)
        task._filters[0].apply([answer], task.task_docs)
        given = answer.filtered_resps[task._filters[0].name]
        tags = parse_reasoning_tags_config(cli_value=REASONING, task_value=task.config.reasoning_tags)
        if tags is not None and isinstance(given, str):
            given = strip_reasoning_tags(given, tags)
        more = {"full_docs": task.eval_docs_no_media} if task.config.full_docs else {}
        with redirect_stdout(io.StringIO()):
            found: dict[str, Any] = task.process_results(document, [given], **more)
        return found

    def _number(self, results: Mapping[str, Any]) -> float:
        """Return the score that a sample's results hold, from 0 to 1."""
        task = self._task()
        known = [self.score_by] if self.score_by else list(task.aggregation())
        name = next((one for one in known if one in results), None)
        if name is None:
            raise ValueError(f"{self.name} gives no {' or '.join(known)} for this sample; it gives {list(results)}")
        value, key = results[name], task.config.score_key
        value = value[key] if isinstance(value, Mapping) and key in value else value
        if not isinstance(value, int | float) and self.full_score is not None:
            value = _aggregated(task.aggregation()[name], [results[name]])
        if not isinstance(value, int | float):
            raise ValueError(
                f"{self.name}: metric {name} gives no number for a single sample. Choose another one by score_by "
                f"({', '.join(task.aggregation())}), or say by full_score what a perfect answer gets, and each sample "
                "is aggregated alone"
            )
        score = float(value) / (self.full_score or 1.0)
        if not 0 <= score <= 1:
            raise ValueError(
                f"{self.name}: metric {name} is {value:g} for a sample, and scores go from 0 to 1; say by full_score "
                "what a perfect answer gets"
            )
        return score

    def _probe(self, sample: Sample) -> None:
        """Find out before the run whether the metric gives a number at all."""
        try:
            results = self._results(sample.id, "")
        except Exception:  # not every metric takes an empty answer
            return
        self._number(results)


def _said(error: BaseException) -> str:
    """Return an error in words; for a retried call, that of the last time."""
    attempt = getattr(error, "last_attempt", None)
    if attempt is not None:
        error = attempt.exception()
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@cache
def _manager(include_path: str | None) -> Any:
    """Return lmms-eval's index of tasks, which takes seconds to make."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError('LmmsTask needs lmms-eval, which is not installed here: pip install -e ".[lmms]" (about 7 GB)')
    from lmms_eval.tasks import TaskManager  # type: ignore[import-not-found]
    from loguru import logger  # type: ignore[import-not-found]

    logger.disable("lmms_eval")  # hundreds of lines for developers, in the middle of the progress bar
    return TaskManager("ERROR", include_path=include_path, model_name=MODEL)


@cache
def _config(name: str, include_path: str | None) -> dict[str, Any]:
    """Return what the task's file says, after a look whether the task can be run here.

    Raises:
        ValueError: if there is no such task, or it is of another kind; it says which.
    """
    manager = _manager(include_path)
    from lmms_eval.utils import load_yaml_config  # type: ignore[import-not-found]

    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_subtasks, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `lmms_eval --tasks list` names them"
        raise ValueError(f"lmms-eval has no task {name!r}{hint}")
    entry = manager.task_index[name]
    if entry["type"] != "task":
        if entry["type"] == "python_task":
            raise ValueError(f"{name} is a task written as a class; only tasks of a YAML file can be run here")
        inside = entry["task"]
        if entry["type"] == "group":
            inside = load_yaml_config(entry["yaml_path"], mode="simple")["task"]
        raise ValueError(f"{name} is a group of tasks; name one of them: {', '.join(map(str, inside))}")
    try:
        config: dict[str, Any] = load_yaml_config(entry["yaml_path"], mode="full")
    except Exception as error:
        raise ValueError(f"{name} cannot be loaded by lmms-eval: {_said(error)}") from error
    kind = config.get("output_type", "generate_until")
    if kind != "generate_until":
        raise ValueError(
            f"{name} is a {kind} task. Only generate_until can be run here: likelihoods of given answers are not "
            "computed, and one question gets one answer"
        )
    for key, most in (("num_fewshot", 0), ("repeats", 1)):
        if (config.get(key) or most) > most:
            raise ValueError(f"{name} has {key}={config[key]}; only {most} can be run here")
    config.setdefault("metric_list", [{"metric": "exact_match", "aggregation": "mean"}])
    return config


@cache
def loaded(name: str, include_path: str | None = None, data: str | None = None) -> Any:
    """Return lmms-eval's task with its data.

    Args:
        name: name of the task.
        include_path: folder with more tasks.
        data: folder with its data set; from the hub if left out.

    Raises:
        ValueError: if the data cannot be had.
    """
    from lmms_eval.api.task import ConfigurableMessagesTask  # type: ignore[import-not-found]

    # lmms-eval writes into it.
    config = copy.deepcopy(_config(name, include_path))
    if data is not None:
        own = {"dataset_path": data, "dataset_kwargs": {"load_from_disk": True}}
        config |= {**own, "dataset_name": None, "process_docs": None}
    try:
        return ConfigurableMessagesTask(config=config, model_name=MODEL)
    except Exception as error:
        place = data or "/".join(filter(None, (config.get("dataset_path"), config.get("dataset_name"))))
        raise ValueError(
            f"the data of {name} ({place}) cannot be had: {_said(error)}. It comes from the hub (some need `hf auth "
            "login`), or from a folder by the option data"
        ) from error


def _asked(task: Any, document: Any) -> tuple[Image.Image, str]:
    """Return the image and the text of a document, as lmms-eval hands them to chat models.

    Raises:
        ValueError: if there is anything but one image before one text.
    """
    messages = task.doc_to_messages(document)
    parts = [(message["role"], part) for message in messages for part in message["content"]]
    kinds = [f"{role} {part['type']}" for role, part in parts]
    if kinds != ["user image", "user text"]:
        raise ValueError(f"it shows {', '.join(kinds) or 'nothing'}; only one image before one text can be asked about")
    image = parts[0][1]["url"]
    return image if isinstance(image, Image.Image) else load_image(str(image)), parts[1][1]["text"]


def _answers(task: Any, document: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the accepted answers, for people who read the records; the metric looks for itself."""
    found = task.doc_to_target(document)
    if found == task.config.doc_to_target and found not in document:
        found = document.get(f"{found}s", found)  # VQAv2 and TextVQA name a column that is not there
    every = found if isinstance(found, list) else [found]
    return tuple(dict.fromkeys(str(one["answer"] if isinstance(one, Mapping) else one) for one in every))


def _aggregated(function: Callable[..., Any], values: Sequence[Any]) -> Any:
    """Return what a metric of lmms-eval makes of the values of many samples."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), _restored(function):
        takes = inspect.signature(function).parameters
        more = {"args": SimpleNamespace(output_path=folder)} if "args" in takes else {}
        return function(list(values), **more)


@contextmanager
def _restored(function: Callable[..., Any]) -> Iterator[None]:
    """Undo what a function does to the variables of its module: OCRBench's adds up in one, over all calls."""
    variables = getattr(inspect.unwrap(function), "__globals__", {})
    before = {name: copy.copy(value) for name, value in variables.items() if isinstance(value, dict | list)}
    try:
        yield
    finally:
        variables.update(before)
