"""Draws `docs/images/question-first-side-by-side.png`: kept tokens and answers of four strategies at 5 %.

Run it: ``python docs/_site/draw_failures.py``

The pages are held-out pages of the evaluation in `docs/results/which-method.md`. The first question is a failure of
`QuestionFirst`, the other two are failures of other strategies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tokenprune import Budget, compare
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.models.mini.pages import make_page
from tokenprune.strategies import CDPruner, DivPrune, HiRED, QuestionFirst

FILE = Path(__file__).parents[1] / "images" / "question-first-side-by-side.png"
QUESTIONS = ((3045, 0), (3045, 13), (3085, 9))
"""Index of the page, and number of the question."""
BUDGET = Budget(0.05, of="unpadded")
STRATEGIES = (
    QuestionFirst(BUDGET, text_model="mini-pages"),
    CDPruner(BUDGET, text_model="mini-pages"),
    HiRED(BUDGET),
    DivPrune(BUDGET),
)
SIZE, LINE, GAP, INK, WRONG = 36, 48, 32, "#222222", "#b00020"


def draw_column(model: Any, processor: Any, index: int, number: int) -> Image.Image:
    """Return the overlays of all strategies for a question, one below the other, each below its answer.

    Args:
        model: the model.
        processor: its processor.
        index: index of the held-out page.
        number: number of the question.
    """
    page = make_page(index, "heldout")
    question = page.questions[number]
    inputs = model_inputs(model, processor, page.image, [question.text], f"page {index}")
    table = compare(model, inputs, STRATEGIES, processor=processor)
    overlays = [run.overlay(image=page.image) for run in table.runs]
    height = sum(overlay.height + LINE + GAP for overlay in overlays)
    column = Image.new("RGB", (max(overlay.width for overlay in overlays), LINE + GAP + height), "white")
    pen, font, y = ImageDraw.Draw(column), ImageFont.load_default(size=SIZE), LINE + GAP
    pen.text((0, 0), f"{question.text} ({question.answer})", INK, font)
    for row, overlay in zip(table.rows, overlays, strict=True):
        answer = "".join(row.answers[0].split())
        is_right = answer == question.answer
        pen.text((0, y), f"{row.strategy}: {answer}{'' if is_right else ' (wrong)'}", INK if is_right else WRONG, font)
        column.paste(overlay, (0, y + LINE))
        y += overlay.height + LINE + GAP
    return column


def main() -> None:
    """Draw the figure and write it."""
    model, processor = load("mini-pages", "auto", "float32")
    columns = [draw_column(model, processor, *question) for question in QUESTIONS]
    sheet = Image.new("RGB", (sum(c.width + 2 * GAP for c in columns), max(c.height for c in columns) + GAP), "white")
    x = GAP
    for column in columns:
        sheet.paste(column, (x, GAP))
        x += column.width + 2 * GAP
    sheet = sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)
    sheet.quantize(64).save(FILE, optimize=True)


if __name__ == "__main__":
    main()
