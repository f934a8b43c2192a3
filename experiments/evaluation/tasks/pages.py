"""The task of dense pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from PIL import Image

from tokenprune.experiments.evaluation.tasks.base import Sample, Task, to_regions
from tokenprune.models.mini.pages import Page, Question, make_page, pages


def _draw(index: int) -> Image.Image:
    return make_page(index, "heldout").image


@dataclass
class Pages(Task):
    """Questions about dense pages: forms, receipts, tables, charts and maps.

    Splits: the evidence of a question of ``base`` is the base tile, because the question is about the place of an item
    in the image. All other questions have their evidence in ``one tile`` or in ``several tiles``.

    The embedded model ``mini-pages`` was trained on pages; ``mini`` was not.

    Args:
        number: number of pages, each with about 22 questions.
        first: index of the first page.
    """

    number: int = 40
    first: int = 1000

    def samples(self) -> Iterator[Sample]:
        """Yield the questions of each page."""
        for page in pages(self.number, "heldout", self.first):
            group = f"pages/{page.index}"
            image = partial(_draw, page.index)  # drawn again when opened: images of all pages would fill the memory
            for number, question in enumerate(page.questions):
                yield Sample(
                    id=f"{group}/{number}",
                    group=group,
                    image=image,
                    question=question.text,
                    answers=(question.answer,),
                    type=question.type,
                    split=name_split(page, question),
                    evidence=to_regions(question.evidence, page.pixels.shape),
                    evidence_tiles=question.needs,
                )


def name_split(page: Page, question: Question) -> str:
    """Return the difficulty of a question: ``one tile``, ``several tiles`` or ``base``."""
    if question.needs == "base":
        return "base"
    return "one tile" if len(page.find_tiles(question.evidence)) == 1 else "several tiles"
