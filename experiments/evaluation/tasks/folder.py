"""A task with the images, questions and answers of a user."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.experiments.evaluation.hashing import hash_file
from tokenprune.experiments.evaluation.metrics import METRICS
from tokenprune.experiments.evaluation.tasks.base import Sample, Task
from tokenprune.image_files import URL_ERROR, is_url, load_image
from tokenprune.registry import suggest_name

IMAGE_KEYS = ("image", "file_name", "picture", "image_path")
ANSWER_KEYS = ("answers", "answer", "label", "text")
"""Keys of the image and of the answers in a line; the first key that is present is used."""


@dataclass
class Folder(Task):
    """A JSONL or CSV file with an image, a question and the accepted answers on each line.

    Lines look like ``{"image": "a.png", "question": "What is it?", "answer": "a star"}``, with images relative to the
    file. ``answer`` may be a list; ``id``, ``type`` and ``split`` are optional.

    A folder is read in the imagefolder layout of `datasets`: from ``metadata.jsonl`` or ``metadata.csv`` in it or in
    its subfolders, with ``file_name`` for the image. If there is no metadata file, the answer of an image is the name
    of its folder, and `question` is the question of all images.

    Args:
        path: the file, or the folder.
        score_by: name of the metric: exact_match, contains, anls, relaxed_accuracy, vqa_accuracy, f1.
        question: question of lines that have none.
        limit: number of samples, from the first line on; by default all.
    """

    path: str
    score_by: str = "exact_match"
    question: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.score_by not in METRICS:
            hint = suggest_name(self.score_by, METRICS)
            raise ValueError(f"score_by={self.score_by!r} is no metric{hint}; use one of {', '.join(METRICS)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1; omit it for all samples")

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.score_by

    def check(self) -> None:
        """Raise a `ValueError` if there are no lines, or a line is not valid."""
        next(iter(self.samples()), None)

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, with the samples of an image consecutive."""
        if is_url(self.path):  # before `Path` removes a slash
            raise ValueError(
                f"{self.path} is a URL, and URLs are not downloaded; download the data set first, and give its "
                "file or folder"
            )
        root = Path(self.path).expanduser()
        samples = [self._parse_sample(root, *line) for line in self._read_lines(root)]
        ids: set[str] = set()
        for sample in samples:
            if sample.id in ids:
                raise ValueError(f"{root}: two samples have the id {sample.id!r}; ids must differ")
            ids.add(sample.id)
        order = {group: number for number, group in reversed(list(enumerate(sample.group for sample in samples)))}
        yield from sorted(samples[: self.limit], key=lambda sample: order[sample.group])

    def _read_lines(self, root: Path) -> Iterator[tuple[Path, int, Any]]:
        """Yield the file, number and content of each line of the task."""
        if root.is_file():
            files = [root]
        elif root.is_dir():
            names = ("metadata.jsonl", "metadata.csv")
            metadata = {file.parent: file for name in reversed(names) for file in root.rglob(name)}
            files = [metadata[root]] if root in metadata else [metadata[folder] for folder in sorted(metadata)]
            if not files:
                yield from self._list_labeled(root)
                return
        else:
            raise ValueError(
                f"{root}: no such file or folder; give a JSONL or CSV file, or a folder with metadata.jsonl"
            )
        for file in files:
            rows = list(_read_rows(file))
            if not rows:
                raise ValueError(f"{file} has no line; write one JSON object a line: {_EXAMPLE}")
            yield from ((file, number, row) for number, row in rows)

    def _list_labeled(self, root: Path) -> Iterator[tuple[Path, int, Any]]:
        """Yield a line for each image whose folder name is its label."""
        endings = Image.registered_extensions()
        images = [file for file in sorted(root.rglob("*")) if file.suffix.lower() in endings and file.parent != root]
        if not images:
            raise ValueError(f"{root} has no metadata.jsonl; write one JSON object a line: {_EXAMPLE}")
        if not self.question:
            raise ValueError(
                f"{root} has no metadata.jsonl; write one JSON object a line: {_EXAMPLE}. If the folders in it are the "
                "answers, give the question of all images: --task.question"
            )
        for number, file in enumerate(images, start=1):
            relative = file.relative_to(root)
            yield root / "images", number, {"image": str(relative), "answer": file.parent.name, "id": str(relative)}

    def _parse_sample(self, root: Path, file: Path, number: int, row: Any) -> Sample:
        location = f"{file}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{location}: expected an object such as {_EXAMPLE}")
        image = next((row[name] for name in IMAGE_KEYS if row.get(name)), None)
        answer = next((row[name] for name in ANSWER_KEYS if row.get(name) not in (None, "", [])), None)
        question = row.get("question") or self.question
        for name, value in (("image", image), ("question", question), ("answer", answer)):
            if value in (None, "", []):
                raise ValueError(f"{location}: there is no {name}; expected an object such as {_EXAMPLE}")
        if is_url(str(image)):
            raise ValueError(f"{location}: {URL_ERROR.format(image)}")
        # Names include the subfolder of the metadata file, so that two files `a.png` differ.
        subfolder = file.parent.relative_to(root) if root.is_dir() else Path()
        answers = answer if isinstance(answer, list) else [answer]
        name = f"{file.stem}/{number}" if row.get("id") in (None, "") else str(row["id"])
        return Sample(
            id=str(subfolder / name),
            group=str(subfolder / str(image)),
            image=partial(load_image, str(file.parent / str(image))),
            question=str(question),
            answers=tuple(str(entry) for entry in answers),
            type=str(row.get("type") or ""),
            split=str(row.get("split") or ""),
            content=partial(hash_file, file.parent / str(image)),
        )


_EXAMPLE = '{"image": "a.png", "question": "What is it?", "answer": "a star"}'


def _read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and content of the lines of a file; empty lines are skipped."""
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as text:  # spreadsheets write a byte order mark
            yield from enumerate(csv.DictReader(text), start=2)  # the first line holds the column names
        return
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is no JSON ({error}); expected {_EXAMPLE}") from error
