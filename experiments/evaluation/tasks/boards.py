"""The held-out task of the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from PIL import Image

from tokenprune.experiments.evaluation.tasks.base import Sample, Task, to_regions
from tokenprune.models.mini.boards import boards, make_board


def _draw(index: int) -> Image.Image:
    return make_board(index, "heldout").image


@dataclass
class Boards(Task):
    """Questions about notice boards that the embedded model has not seen.

    Splits: a question of ``tiles`` needs the sub-images, of ``base`` the base tile, of ``either`` the sub-images or the
    base tile.

    Args:
        number: number of boards, each with about 18 questions.
        first: index of the first board. The training schedule was selected by results on boards 0 to 71.
    """

    number: int = 40
    first: int = 1000

    def samples(self) -> Iterator[Sample]:
        """Yield the questions of each board."""
        for board in boards(self.number, "heldout", self.first):
            group = f"boards/{board.index}"
            image = partial(_draw, board.index)  # drawn again when opened: images of all boards would fill the memory
            for number, question in enumerate(board.questions):
                yield Sample(
                    id=f"{group}/{number}",
                    group=group,
                    image=image,
                    question=question.text,
                    answers=(question.answer,),
                    type=question.type,
                    split=question.needs,
                    evidence=to_regions([board.items[item].box for item in question.about], board.pixels.shape),
                    evidence_tiles=question.needs,
                )
