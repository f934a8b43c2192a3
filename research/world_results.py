"""Stores and joins the results of several strategies on images of a world."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from research.heldout import Answers

TABLES = ("right", "coverage", "tokens")
"""Fields of `WorldResults` that contain one entry per setting."""


@dataclass
class WorldResults:
    """Results of all settings, image by image.

    Args:
        images: world, split and index of each image, such as ``"pages heldout 3000"``.
        questions: type and split of each question of each image.
        right: for each setting, 1 (correct) or 0 per question of each image.
        coverage: for each setting, coverage of the evidence by the entering tokens per question of each image.
        tokens: for each setting, average tokens of each image.
    """

    images: list[str] = field(default_factory=list)
    questions: list[list[tuple[str, str]]] = field(default_factory=list)
    right: dict[str, list[list[int]]] = field(default_factory=dict)
    coverage: dict[str, list[list[float]]] = field(default_factory=dict)
    tokens: dict[str, list[float]] = field(default_factory=dict)

    def combine(self, other: WorldResults) -> WorldResults:
        """Return the results together: other settings on the same images, or the same settings on other images.

        Coverage that only one of the results contains is kept on the same images, and left out on other images.

        Raises:
            ValueError: if the images overlap in part, or if other images have other settings.
        """
        if self.images == other.images:
            tables = (getattr(self, name) | getattr(other, name) for name in TABLES)
            return WorldResults(self.images, self.questions, *tables)
        if common := set(self.images) & set(other.images):
            raise ValueError(f"{len(common)} of the images are in both results, such as {min(common)}")
        if settings := self.right.keys() ^ other.right.keys():
            raise ValueError(f"the results of other images have other settings, such as {min(settings)!r}")
        tables = (_append(getattr(self, name), getattr(other, name)) for name in TABLES)
        return WorldResults(self.images + other.images, self.questions + other.questions, *tables)

    @classmethod
    def load(cls, path: str | Path) -> WorldResults:
        """Return the results of a JSON file; a file without coverage gives results without coverage."""
        content = json.loads(Path(path).read_text())
        content["questions"] = [[(kind, split) for kind, split in image] for image in content["questions"]]
        content["right"] = {key: [[int(c) for c in row] for row in rows] for key, rows in content["right"].items()}
        return cls(**content)

    def save(self, path: str | Path) -> None:
        """Write the results to a JSON file, with one character per answer. A stop leaves the earlier file unchanged."""
        right = {key: ["".join(map(str, row)) for row in rows] for key, rows in self.right.items()}
        new = Path(f"{path}.new")
        new.write_text(json.dumps(asdict(self) | {"right": right}))
        new.replace(path)

    def answers_of(self, setting: str, kind: str | None = None) -> list[Answers]:
        """Return 1 (correct) or 0 per question of each image, for one type or split of questions or for all."""
        rows = zip(self.right[setting], self.questions, strict=True)
        return [np.array([r for r, k in zip(row, ks, strict=True) if kind is None or kind in k]) for row, ks in rows]


def _append(first: Mapping[str, list[Any]], second: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: rows + second[key] for key, rows in first.items() if key in second}
