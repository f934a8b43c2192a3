"""Measures the greedy accuracy of the miniature model on held-out boards or pages.

Run it: ``python -m research.mini_training.evaluate --world boards``
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenprune.models import mini
from tokenprune.models.mini.boards import Board, Needs, Split, boards
from tokenprune.models.mini.pages import Page, pages
from tokenprune.pipeline import call_generate

__all__ = ["Sample", "answer_questions", "build_inputs", "held_out_samples", "measure_accuracy", "wilson_interval"]


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        image: The image.
        question: The question.
        answer: The correct answer.
        type: Type of the question, see `Question` of the generator.
        needs: Tiles that show the answer: ``tiles``, ``base`` or ``either``.
        board: Index of the image in its split. Samples of the same image are not independent.
    """

    image: Image.Image
    question: str
    answer: str
    type: str
    needs: Needs
    board: int


WORLDS: Mapping[str, Callable[[int, Split, int], Iterator[Board | Page]]] = {"boards": boards, "pages": pages}
"""Generators of images by name."""


def held_out_samples(
    count: int | None = None, *, start: int = 0, split: Split = "heldout", world: str = "boards"
) -> Iterator[Sample]:
    """Yield samples of held-out boards or pages, grouped by image.

    Args:
        count: Number of questions; by default unlimited.
        start: Index of the first image.
        split: ``heldout``, or ``train`` for the training data.
        world: A name of `WORLDS`.

    Yields:
        The samples.
    """
    n_yielded = 0
    while count is None or n_yielded < count:
        for board in WORLDS[world](1, split, start):
            image = board.image
            for question in board.questions[: None if count is None else count - n_yielded]:
                n_yielded += 1
                yield Sample(image, question.text, question.answer, question.type, question.needs, board.index)
        start += 1


def build_inputs(processor: Any, image: Image.Image, questions: Sequence[str]) -> Any:
    """Return the model inputs for several questions about one image.

    Args:
        processor: The processor of the checkpoint.
        image: The image.
        questions: The questions.

    Returns:
        The inputs of ``generate``, with one row per question.
    """
    parts = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": part}], add_generation_prompt=True) for part in parts
    ]
    return processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")


@torch.no_grad()
def answer_questions(model: Any, processor: Any, image: Image.Image, questions: Sequence[str]) -> list[str]:
    """Answer several questions about one image greedily.

    Args:
        model: The model; a reducer may be attached to it.
        processor: The processor of the model.
        image: The image.
        questions: The questions.

    Returns:
        The answers in the order of the questions.
    """
    inputs = build_inputs(processor, image, questions).to(model.device)
    out = call_generate(model, inputs, max_new_tokens=4, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def measure_accuracy(
    model: Any, processor: Any, samples: Iterator[Sample], on_progress: Callable[[int], None] = lambda count: None
) -> dict[str, list[bool]]:
    """Return whether each answer is correct, by type of question and for ``all``.

    Args:
        model: The model; a reducer may be attached to it.
        processor: The processor of the model.
        samples: The samples, grouped by image.
        on_progress: Called after every image with the number of answered questions.

    Returns:
        Whether each answer is correct, by type, in the order of the samples.
    """
    right: dict[str, list[bool]] = {"all": []}
    for _, group in groupby(samples, key=lambda sample: sample.board):
        board_samples = list(group)
        questions = [sample.question for sample in board_samples]
        answers = answer_questions(model, processor, board_samples[0].image, questions)
        for sample, text in zip(board_samples, answers, strict=True):
            right.setdefault(sample.type, []).append(text == sample.answer)
            right["all"].append(text == sample.answer)
        on_progress(len(right["all"]))
    return right


def wilson_interval(right: Sequence[bool], z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the share of correct answers.

    Args:
        right: Whether each answer is correct.
        z: Quantile of the normal distribution.

    Returns:
        Lower and upper end of the interval.
    """
    count = len(right)
    share = sum(right) / count
    center = share + z * z / (2 * count)
    half_width = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (center - half_width) / (1 + z * z / count), (center + half_width) / (1 + z * z / count)


def main() -> None:
    """Parse the command line and print one JSON line per type of question."""
    parser = argparse.ArgumentParser(description="Greedy accuracy on held-out images.")
    parser.add_argument("--checkpoint", type=Path, default=mini.path(), help="folder of the checkpoint")
    parser.add_argument("--count", type=int, default=2000, help="number of questions")
    parser.add_argument("--start", type=int, default=0, help="index of the first image")
    parser.add_argument("--world", choices=WORLDS, default="boards", help="generator of the images")
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    results = measure_accuracy(
        model, processor, held_out_samples(options.count, start=options.start, world=options.world)
    )
    for name, right in results.items():
        ends = [round(end, 4) for end in wilson_interval(right)]
        share = round(sum(right) / len(right), 4)
        print(json.dumps({"type": name, "n": len(right), "accuracy": share, "interval": ends}))


if __name__ == "__main__":
    main()
