"""Held-out samples of the miniature model, and its greedy accuracy: ``python -m research.mini_training.evaluate``."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenprune.models import mini
from tokenprune.models.mini.boards import Needs, Split, boards
from tokenprune.pipeline import call_generate

__all__ = ["Sample", "accuracy", "answers", "ask", "held_out", "interval"]


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        image: The image.
        question: The question.
        answer: The correct answer.
        type: What is asked, see `tokenprune.models.mini.boards.Question`.
        needs: Where the answer stands: ``tiles``, ``base`` or ``either``.
        board: Number of the image in its split. Samples of the same image are not independent.
    """

    image: Image.Image
    question: str
    answer: str
    type: str
    needs: Needs
    board: int


def held_out(count: int | None = None, *, start: int = 0, split: Split = "heldout") -> Iterator[Sample]:
    """Yield held-out questions, all questions of an image after each other.

    Args:
        count: How many questions; without it they never end.
        start: The first image.
        split: ``heldout``, or ``train`` to look at what the model was trained on.

    Yields:
        The samples.
    """
    given = 0
    while count is None or given < count:
        for board in boards(1, split, start):
            image = board.image
            for question in board.questions[: None if count is None else count - given]:
                given += 1
                yield Sample(image, question.text, question.answer, question.type, question.needs, board.index)
        start += 1


def ask(processor: Any, image: Image.Image, questions: Sequence[str]) -> Any:
    """Return model inputs for several questions about one image.

    Args:
        processor: The processor of the checkpoint.
        image: The image.
        questions: The questions.

    Returns:
        The inputs of ``generate``, one row a question.
    """
    parts = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": part}], add_generation_prompt=True) for part in parts
    ]
    return processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")


@torch.no_grad()
def answers(model: Any, processor: Any, image: Image.Image, questions: Sequence[str]) -> list[str]:
    """Answer several questions about one image greedily.

    Args:
        model: The model; a reducer may be attached to it.
        processor: Its processor.
        image: The image.
        questions: The questions.

    Returns:
        The answers in order.
    """
    inputs = ask(processor, image, questions).to(model.device)
    out = call_generate(model, inputs, max_new_tokens=4, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def accuracy(
    model: Any, processor: Any, samples: Iterator[Sample], progress: Callable[[int], None] = lambda done: None
) -> dict[str, list[bool]]:
    """Return for each type of question, and for ``all``, which answers were right.

    Args:
        model: The model; a reducer may be attached to it.
        processor: Its processor.
        samples: The samples, questions of the same image after each other.
        progress: Is told the number of questions done after every image.

    Returns:
        Right or wrong by type, in order.
    """
    right: dict[str, list[bool]] = {"all": []}
    for _, group in groupby(samples, key=lambda sample: sample.board):
        same = list(group)
        given = answers(model, processor, same[0].image, [sample.question for sample in same])
        for sample, text in zip(same, given, strict=True):
            right.setdefault(sample.type, []).append(text == sample.answer)
            right["all"].append(text == sample.answer)
        progress(len(right["all"]))
    return right


def interval(right: Sequence[bool], z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share.

    Args:
        right: The trials.
        z: Quantile of the normal distribution.

    Returns:
        Lower and upper end.
    """
    count = len(right)
    share = sum(right) / count
    middle = share + z * z / (2 * count)
    half = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def main() -> None:
    """Read the command line and print one JSON line a type of question."""
    parser = argparse.ArgumentParser(description="Greedy accuracy on held-out boards.")
    parser.add_argument("--checkpoint", type=Path, default=mini.path(), help="folder of the checkpoint")
    parser.add_argument("--count", type=int, default=2000, help="number of questions")
    parser.add_argument("--start", type=int, default=0, help="first image")
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    for name, right in accuracy(model, processor, held_out(options.count, start=options.start)).items():
        ends = [round(end, 4) for end in interval(right)]
        share = round(sum(right) / len(right), 4)
        print(json.dumps({"type": name, "n": len(right), "accuracy": share, "interval": ends}))


if __name__ == "__main__":
    main()
