"""What every task is: samples, and a score for an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tokenprune.experiments.evaluation.metrics import METRICS
from tokenprune.policies import Configurable
from tokenprune.registry import collect

TASKS = "tokenprune.experiments.evaluation.tasks"
"""Where tasks live, and the entry point group of plug-ins."""


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Args:
        id: unique in its task and the same in every run.
        group: the image; samples of one group follow each other, and are not independent.
        image: opens the image.
        question: the question.
        answers: accepted answers.
        type: kind of question, for tables.
        split: kind of difficulty, for tables.
        content: returns a hash of the file of the image; None hashes the pixels.
    """

    id: str
    group: str
    image: Callable[[], Image.Image]
    question: str
    answers: tuple[str, ...]
    type: str = ""
    split: str = ""
    content: Callable[[], str] | None = None


@dataclass
class Task(Configurable, ABC):
    """A task. Subclass it and write `samples`; its fields are its configuration."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Packages beside the usual ones whose version can change an answer or a score."""

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return "exact_match"

    def check(self) -> None:
        """Raise a `ValueError` if the task cannot be run; all tasks of an ablation are asked before the first run."""

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yield the samples, those of one image after each other, always in the same order.

        Raises:
            ValueError: if the data cannot be had; it says what was expected and what to do.
        """

    def files(self) -> Iterable[Path]:
        """Return the files that define prompts or scores, beside the module of the task; none if there are none.

        A change of such a file is a change of the identity of a run. Images and questions belong to `samples`.
        """
        return ()

    def prompt(self, sample: Sample) -> str:
        """Return what the model is asked."""
        return sample.question

    def generation(self) -> Mapping[str, Any]:
        """Return arguments of `generate` that replace those of the experiment; none if the task does not care."""
        return {}

    def score(self, sample: Sample, prediction: str) -> float:
        """Return how good an answer is, from 0 to 1."""
        return METRICS[self.metric](prediction, sample.answers)

    def summary(self, predictions: Mapping[str, str]) -> Mapping[str, float | str]:
        """Return numbers that only all answers together have, if there are any.

        Args:
            predictions: the answer to each sample that was answered, by its id.
        """
        return {}


@cache
def tasks() -> Mapping[str, type[Task]]:
    """Return all known tasks by class name."""
    return collect(TASKS, Task)  # type: ignore[type-abstract]
