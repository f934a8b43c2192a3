"""Draws the figures of `docs/explanation/question-first.md`: kept tokens and answers at 5 % of the tokens.

Run it: ``python docs/_site/draw_failures.py``

The pages are held-out pages of the evaluation in `docs/results/which-method.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tokenprune import Budget, compare
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.models.mini.pages import make_page
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import CDPruner, DivPrune, HiRED, QuestionFirst

FOLDER = Path(__file__).parents[1] / "images"
FAILURES = ((6021, 3), (6021, 18), (6021, 15))
"""Questions that `QuestionFirst` answers wrong: index of the page, and number of the question."""
COMPARED = ((6021, 12), (6021, 0), (6026, 13))
"""Questions that are answered by all strategies; the first one is a failure of `QuestionFirst`."""
BUDGET = Budget(0.05, of="unpadded")
STRATEGIES = (
    QuestionFirst(BUDGET, text_model="mini-pages"),
    CDPruner(BUDGET, text_model="mini-pages"),
    HiRED(BUDGET),
    DivPrune(BUDGET),
)
SIZE, LINE, GAP, INK, WRONG = 36, 48, 32, "#222222", "#b00020"


def draw_column(
    model: Any, processor: Any, index: int, number: int, reducers: Sequence[TokenReducer]
) -> tuple[list[bool], Image.Image]:
    """Return whether the strategies are right, and their overlays one below the other, each below its answer.

    Args:
        model: the model.
        processor: its processor.
        index: index of the held-out page.
        number: number of the question.
        reducers: the strategies.
    """
    page = make_page(index, "heldout")
    question = page.questions[number]
    inputs = model_inputs(model, processor, page.image, [question.text], f"page {index}")
    table = compare(model, inputs, reducers, processor=processor)
    overlays = [run.overlay(image=page.image) for run in table.runs]
    height = sum(overlay.height + LINE + GAP for overlay in overlays)
    column = Image.new("RGB", (max(overlay.width for overlay in overlays), LINE + GAP + height), "white")
    pen, font, y = ImageDraw.Draw(column), ImageFont.load_default(size=SIZE), LINE + GAP
    pen.text((0, 0), f"{question.text} ({question.answer})", INK, font)
    answers = ["".join(row.answers[0].split()) for row in table.rows]
    results = [answer == question.answer for answer in answers]
    for row, overlay, answer, is_right in zip(table.rows, overlays, answers, results, strict=True):
        pen.text((0, y), f"{row.strategy}: {answer}{'' if is_right else ' (wrong)'}", INK if is_right else WRONG, font)
        column.paste(overlay, (0, y + LINE))
        y += overlay.height + LINE + GAP
    return results, column


def draw_figure(
    questions: Sequence[tuple[int, int]], reducers: Sequence[TokenReducer]
) -> tuple[list[list[bool]], Image.Image]:
    """Return whether each strategy answers each question right, `[questions][reducers]`, and the figure.

    Args:
        questions: index of the page and number of the question of each column.
        reducers: the strategy of each row.
    """
    model, processor = load("mini-pages", "auto", "float32")
    results, columns = zip(*(draw_column(model, processor, *question, reducers) for question in questions), strict=True)
    sheet = Image.new("RGB", (sum(c.width + 2 * GAP for c in columns), max(c.height for c in columns) + GAP), "white")
    x = GAP
    for column in columns:
        sheet.paste(column, (x, GAP))
        x += column.width + 2 * GAP
    return list(results), sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    for name, questions, count in (("failures", FAILURES, 1), ("side-by-side", COMPARED, len(STRATEGIES))):
        _, figure = draw_figure(questions, STRATEGIES[:count])
        figure.quantize(256, Image.Quantize.FASTOCTREE).save(FOLDER / f"question-first-{name}.png", optimize=True)
