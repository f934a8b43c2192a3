"""A user's own pictures, questions and answers."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenprune.experiments.metrics import METRICS
from tokenprune.experiments.tasks.base import Sample, Task
from tokenprune.pictures import load_picture

PICTURE = ("image", "file_name", "picture", "image_path")
ANSWER = ("answers", "answer", "label", "text")
"""Names under which a line may give its picture and its answers; the first found counts."""


@dataclass
class Folder(Task):
    """A JSONL or CSV file with a picture, a question and the accepted answers on each line.

    Lines look like ``{"image": "a.png", "question": "What is it?", "answer": "a star"}``, with pictures relative to the
    file. A folder is read by its ``metadata.jsonl`` or ``metadata.csv`` (the imagefolder layout of `datasets`, with
    ``file_name`` for the picture). ``answer`` may be a list; ``id``, ``type`` and ``split`` are optional.

    Args:
        path: the file, or a folder with a metadata file.
        score_by: name of the metric: exact_match, contains, anls, relaxed_accuracy, vqa_accuracy, f1.
        question: asked of pictures whose line has no question.
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

    def samples(self) -> Iterator[Sample]:
        """Yield the lines, those about one picture together."""
        file = self._file()
        rows = [self._sample(file, number, row) for number, row in enumerate(_lines(file), start=1)]
        if not rows:
            raise ValueError(f"{file} has no line; write one JSON object a line: {_EXAMPLE}")
        seen: set[str] = set()
        for row in rows:
            if row.id in seen:
                raise ValueError(f"{file}: two samples have the id {row.id!r}; ids must differ")
            seen.add(row.id)
        order = {group: place for place, group in reversed(list(enumerate(row.group for row in rows)))}
        yield from sorted(rows[: self.limit], key=lambda row: order[row.group])

    def _file(self) -> Path:
        place = Path(self.path).expanduser()
        if place.is_dir():
            for name in ("metadata.jsonl", "metadata.csv"):
                if (place / name).is_file():
                    return place / name
            raise ValueError(f"{place} has no metadata.jsonl; write one JSON object a line: {_EXAMPLE}")
        if not place.is_file():
            raise ValueError(
                f"{place}: no such file or folder; give a JSONL or CSV file, or a folder with metadata.jsonl"
            )
        return place

    def _sample(self, file: Path, number: int, row: Any) -> Sample:
        where = f"{file}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object such as {_EXAMPLE}")
        picture = next((row[name] for name in PICTURE if row.get(name)), None)
        answer = next((row[name] for name in ANSWER if row.get(name) not in (None, "", [])), None)
        question = row.get("question") or self.question
        for name, value in (("image", picture), ("question", question), ("answer", answer)):
            if value in (None, "", []):
                raise ValueError(f"{where}: there is no {name}; expected an object such as {_EXAMPLE}")
        answers = answer if isinstance(answer, list) else [answer]
        return Sample(
            id=f"{file.stem}/{number}" if row.get("id") in (None, "") else str(row["id"]),
            group=str(picture),
            picture=partial(load_picture, str(file.parent / str(picture))),
            question=str(question),
            answers=tuple(str(one) for one in answers),
            type=str(row.get("type") or ""),
            split=str(row.get("split") or ""),
        )


_EXAMPLE = '{"image": "a.png", "question": "What is it?", "answer": "a star"}'


def _lines(file: Path) -> Iterator[Any]:
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as text:  # spreadsheets begin a file with a mark
            yield from csv.DictReader(text)
        return
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is no JSON ({error}); expected {_EXAMPLE}") from error
