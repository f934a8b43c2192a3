"""Draws `docs/images/overlay.png`: the kept tokens of a board, and answers with all tokens and with 20 % of them.

Run it: ``python docs/_site/draw_overlay.py``
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tokenprune import compare
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.image_files import load_image
from tokenprune.models import mini
from tokenprune.strategies import HiRED

FILE = Path(__file__).parents[1] / "images" / "overlay.png"
QUESTIONS = (
    "What number is on the green square?",
    "What shape is green?",
    "How many shapes are there?",
    "What paper is this?",
)
LINE, SIZE, MARGIN, INK = 42, 30, 10, "#222222"
COLUMNS = (MARGIN, 600, 860)
"""Left edges of the columns question, all tokens and 20 %, in pixels."""


def answer_questions() -> tuple[list[tuple[str, str, str]], Image.Image]:
    """Return the header and a line per question (question, answer with all tokens, answer at 20 %), and the overlay."""
    model, processor = load("mini", "auto", "auto")
    board = load_image(mini.image_path())
    lines, tables = [], []
    for question in QUESTIONS:
        inputs = model_inputs(model, processor, board, [question], "board.png")
        tables.append(compare(model, inputs, [HiRED(1.0), HiRED(0.2)], processor=processor))
        full, reduced = tables[-1].rows
        lines.append((question, full.answers[0], reduced.answers[0]))
    full, reduced = tables[0].rows
    header = ("", f"all {full.kept} tokens", f"HiRED(0.2): {reduced.kept} tokens")
    return [header, *lines], tables[0].runs[1].overlay(image=board)


def draw_answers(lines: Sequence[Sequence[str]], overlay: Image.Image) -> Image.Image:
    """Return the overlay with a table of the answers below it.

    Args:
        lines: cells of the header and of each question.
        overlay: the drawn tiles.
    """
    sheet = Image.new("RGB", (overlay.width, overlay.height + LINE * len(lines) + 2 * MARGIN), "white")
    sheet.paste(overlay, (0, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=SIZE)
    for number, cells in enumerate(lines):
        y = overlay.height + MARGIN + LINE * number
        for x, text in zip(COLUMNS, cells, strict=True):
            pen.text((x, y), text, INK, font)
    y = overlay.height + MARGIN + LINE - 1
    pen.line((MARGIN, y, sheet.width - MARGIN, y), INK)
    return sheet


def main(file: Path = FILE) -> None:
    """Write the image.

    Args:
        file: the PNG file.
    """
    draw_answers(*answer_questions()).save(file, optimize=True)


if __name__ == "__main__":
    main()
