"""A user's own images, questions and answers."""

from __future__ import annotations

import csv
import difflib
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
from tokenprune.image_files import NOT_FETCHED, is_address, load_image

IMAGE = ("image", "file_name", "picture", "image_path")
ANSWER = ("answers", "answer", "label", "text")
"""Names under which a line may give its image and its answers; the first found counts."""


@dataclass
class Folder(Task):
    """A JSONL or CSV file with an image, a question and the accepted answers on each line.

    Lines look like ``{"image": "a.png", "question": "What is it?", "answer": "a star"}``, with images relative to the
    file. ``answer`` may be a list; ``id``, ``type`` and ``split`` are optional.

    A folder is read in the imagefolder layout of `datasets`: by ``metadata.jsonl`` or ``metadata.csv`` in it or in
    folders below it, with ``file_name`` for the image. If there is none, each image's answer is the name of its
    folder, and `question` is asked of all.

    Args:
        path: the file, or the folder.
        score_by: name of the metric: exact_match, contains, anls, relaxed_accuracy, vqa_accuracy, f1.
        question: asked of images whose line has no question.
        limit: only the first samples; all if left out.
    """

    path: str
    score_by: str = "exact_match"
    question: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the options once."""
        if self.score_by not in METRICS:
            near = difflib.get_close_matches(self.score_by, METRICS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"score_by={self.score_by!r} is not known{hint}; use one of {', '.join(METRICS)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1; leave it out for all samples")

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.score_by

    def check(self) -> None:
        """Raise a `ValueError` if there are no lines, or a line is not right."""
        next(iter(self.samples()), None)

    def samples(self) -> Iterator[Sample]:
        """Yield the lines, those about one image together."""
        if is_address(self.path):  # before `Path` removes a slash
            raise ValueError(
                f"{self.path} is an address, and addresses are not fetched; download the data set first, and give its "
                "file or folder"
            )
        root = Path(self.path).expanduser()
        rows = [self._sample(root, *line) for line in self._lines(root)]
        seen: set[str] = set()
        for row in rows:
            if row.id in seen:
                raise ValueError(f"{root}: two samples have the id {row.id!r}; ids must differ")
            seen.add(row.id)
        order = {group: place for place, group in reversed(list(enumerate(row.group for row in rows)))}
        yield from sorted(rows[: self.limit], key=lambda row: order[row.group])

    def _lines(self, root: Path) -> Iterator[tuple[Path, int, Any]]:
        """Yield file, number and content of every line."""
        if root.is_file():
            files = [root]
        elif root.is_dir():
            names = ("metadata.jsonl", "metadata.csv")
            found = {file.parent: file for name in reversed(names) for file in root.rglob(name)}
            files = [found[root]] if root in found else [found[folder] for folder in sorted(found)]
            if not files:
                yield from self._labeled(root)
                return
        else:
            raise ValueError(
                f"{root}: no such file or folder; give a JSONL or CSV file, or a folder with metadata.jsonl"
            )
        for file in files:
            rows = list(_rows(file))
            if not rows:
                raise ValueError(f"{file} has no line; write one JSON object a line: {_EXAMPLE}")
            yield from ((file, number, row) for number, row in rows)

    def _labeled(self, root: Path) -> Iterator[tuple[Path, int, Any]]:
        """Yield a line for every image in a folder of its label."""
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
            place = file.relative_to(root)
            yield root / "images", number, {"image": str(place), "answer": file.parent.name, "id": str(place)}

    def _sample(self, root: Path, file: Path, number: int, row: Any) -> Sample:
        where = f"{file}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object such as {_EXAMPLE}")
        image = next((row[name] for name in IMAGE if row.get(name)), None)
        answer = next((row[name] for name in ANSWER if row.get(name) not in (None, "", [])), None)
        question = row.get("question") or self.question
        for name, value in (("image", image), ("question", question), ("answer", answer)):
            if value in (None, "", []):
                raise ValueError(f"{where}: there is no {name}; expected an object such as {_EXAMPLE}")
        if is_address(str(image)):
            raise ValueError(f"{where}: {NOT_FETCHED.format(image)}")
        # Lines of a metadata file in a folder below say in which folder they stand, so that two `a.png` stay apart.
        below = file.parent.relative_to(root) if root.is_dir() else Path()
        answers = answer if isinstance(answer, list) else [answer]
        return Sample(
            id=str(below / f"{file.stem}/{number}") if row.get("id") in (None, "") else str(below / str(row["id"])),
            group=str(below / str(image)),
            image=partial(load_image, str(file.parent / str(image))),
            question=str(question),
            answers=tuple(str(one) for one in answers),
            type=str(row.get("type") or ""),
            split=str(row.get("split") or ""),
            content=partial(hash_file, file.parent / str(image)),
        )


_EXAMPLE = '{"image": "a.png", "question": "What is it?", "answer": "a star"}'


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield number and content of the lines of a file; empty ones are left out."""
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as text:  # spreadsheets begin a file with a mark
            yield from enumerate(csv.DictReader(text), start=2)  # the first line names the columns
        return
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is no JSON ({error}); expected {_EXAMPLE}") from error
