"""The interface of a task, which yields samples and scores answers, and the tasks by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tokenprune.experiments.evaluation.evidence import EvidenceTiles, Region
from tokenprune.experiments.evaluation.metrics import METRICS
from tokenprune.policies import Configurable
from tokenprune.registry import collect_classes

TASKS = "tokenprune.experiments.evaluation.tasks"
"""Package of the shipped tasks, and the entry point group of plug-ins."""


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Args:
        id: unique in its task and equal in every run.
        group: name of the image. The samples of a group are consecutive, and they are not statistically independent.
        image: function that opens and returns the image.
        question: the question.
        answers: accepted answers.
        type: kind of question, for tables.
        split: kind of difficulty, for tables.
        content: function that returns a hash of the image file; if None, the pixels are hashed.
        evidence: regions of the image that show the answer; if empty, the evidence is unknown.
        evidence_tiles: tiles that show the evidence.
    """

    id: str
    group: str
    image: Callable[[], Image.Image]
    question: str
    answers: tuple[str, ...]
    type: str = ""
    split: str = ""
    content: Callable[[], str] | None = None
    evidence: tuple[Region, ...] = ()
    evidence_tiles: EvidenceTiles = "either"


@dataclass
class Task(Configurable, ABC):
    """Base class of tasks. A subclass implements `samples`, and its dataclass fields are its configuration."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Further packages whose version can change an answer or a score."""

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return "exact_match"

    def check(self) -> None:
        """Raise a `ValueError` if the task cannot be run; an ablation checks all its tasks before the first sample."""

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yield the samples in a fixed order, with the samples of an image consecutive.

        Raises:
            ValueError: if the data cannot be loaded; the error states the expected data and the action.
        """

    def files(self) -> Iterable[Path]:
        """Return the files that define prompts or scores, except the module of the task.

        A change of such a file changes the identity of a run. Images and questions are covered by `samples`.
        """
        return ()

    def prompt(self, sample: Sample) -> str:
        """Return the text prompt of a sample."""
        return sample.question

    def generation(self) -> Mapping[str, Any]:
        """Return arguments of `generate` that replace the experiment's; if empty, the experiment's are used."""
        return {}

    def score(self, sample: Sample, prediction: str) -> float:
        """Return the score of an answer, from 0 to 1."""
        return METRICS[self.metric](prediction, sample.answers)

    def summary(self, predictions: Mapping[str, str]) -> Mapping[str, float | str]:
        """Return the metrics that need all answers at once, by name; empty if the task has none.

        Args:
            predictions: answers by sample id; failed samples are not included.
        """
        return {}


def to_regions(boxes: Iterable[tuple[int, int, int, int]], shape: Sequence[int]) -> tuple[Region, ...]:
    """Return boxes in pixels as regions in fractions of the image.

    Args:
        boxes: top, left, bottom, right in pixels.
        shape: height and width of the image; further entries are ignored.
    """
    height, width = shape[:2]
    return tuple((top / height, left / width, bottom / height, right / width) for top, left, bottom, right in boxes)


@cache
def tasks() -> Mapping[str, type[Task]]:
    """Return all tasks by class name, plug-ins included."""
    return collect_classes(TASKS, Task)
