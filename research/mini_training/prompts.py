"""Training sequences: the kept visual tokens of a board, and questions that they can answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from research.mini_training.build import make_tokenizer
from research.mini_training.lessons import (
    IGNORE,
    Flags,
    Integers,
    Lesson,
    draw_subset,
    is_answerable,
    pack_positions,
)
from tokenprune.models.mini.boards import Board, Question
from tokenprune.models.mini.pages import Question as PageQuestion

QUESTIONS = 10
"""Number of questions about each image in a step of stage 2."""


@dataclass(frozen=True)
class Prompt:
    """One training sequence: the image, then questions that attend only to the image and to themselves.

    Attributes:
        token_indices: Flat index of the tile token at each visual position, -1 for a newline token, `[visual]`.
        positions: Position ids of the visual tokens, `[visual]`.
        ids: Token ids of all questions with their answers, `[text]`.
        text_positions: Position ids of the text, `[text]`.
        block: Index of the question of each text token, `[text]`.
        labels: Next token at positions with a loss, and `IGNORE` elsewhere, `[text]`.
        early_labels: First token of the answer at the last word of the question and the signs after it, and `IGNORE`
            elsewhere, `[text]`.
    """

    token_indices: Integers
    positions: Integers
    ids: Integers
    text_positions: Integers
    block: Integers
    labels: Integers
    early_labels: Integers


def make_prompt(
    board: Board,
    truth: Lesson,
    rng: np.random.Generator,
    tokenize: Callable[[str], list[int]],
    *,
    gaps: bool,
    weights: Mapping[str, float],
) -> Prompt:
    """Return a training sequence with random visual tokens of a board and random questions that they can answer.

    Args:
        board: The board.
        truth: Ground truth of the board.
        rng: The random generator.
        tokenize: Returns the token ids of a text.
        gaps: Whether tokens are removed.
        weights: Factors of the probability of question types; 1 by default.

    Returns:
        The training sequence.
    """
    kept = draw_kept(rng, truth.item_masks, gaps=gaps)
    candidates = [question for question in board.questions if is_answerable(question, truth, kept)]
    chances = [_base_weight(question) * weights.get(question.type, 1.0) for question in candidates]
    return assemble_prompt(pack_positions(board), kept, candidates, chances, rng, tokenize, gaps=gaps)


def draw_kept(rng: np.random.Generator, item_masks: Flags, *, gaps: bool) -> Flags:
    """Return a random subset of the visual tokens if tokens are removed, otherwise all, bool `[tiles, tokens]`."""
    shows_item: Flags = np.asarray(item_masks.any(0))
    return draw_subset(rng, shows_item) if gaps else np.ones(shows_item.shape, dtype=bool)


def assemble_prompt(
    packing: tuple[Integers, Integers],
    kept: Flags,
    candidates: Sequence[Question | PageQuestion],
    chances: Sequence[float],
    rng: np.random.Generator,
    tokenize: Callable[[str], list[int]],
    *,
    gaps: bool,
    limit: int = QUESTIONS,
) -> Prompt:
    """Return a training sequence with the kept visual tokens of an image and random questions.

    Args:
        packing: Result of `pack_positions`.
        kept: The kept tokens, bool `[tiles, tokens]`.
        candidates: The questions to draw from.
        chances: Probability of each candidate, up to a common factor.
        rng: The random generator.
        tokenize: Returns the token ids of a text.
        gaps: Whether tokens are removed.
        limit: Largest number of questions.

    Returns:
        The training sequence.
    """
    order, grid_rows = packing
    stays = (order >= 0) & kept.reshape(-1)[order]
    newlines = rng.choice(["kept rows", "all", "none"], p=[0.7, 0.2, 0.1]) if gaps else "all"
    if newlines == "all":
        stays |= order < 0
    elif newlines == "kept rows":
        stays |= (order < 0) & np.isin(grid_rows, grid_rows[stays & (grid_rows >= 0)])
    # The prompt requires at least one visual token; the first token of the base tile always exists.
    stays[0] |= not stays.any()
    prefix = _PREFIX_LENGTH
    preserve = gaps and rng.random() < 0.3
    positions = prefix + (np.flatnonzero(stays) if preserve else np.arange(int(stays.sum())))
    text_start = prefix + (len(order) if preserve else len(positions))
    size = min(limit, len(candidates))
    drawn = rng.choice(len(candidates), size=size, replace=False, p=np.array(chances) / np.sum(chances))
    ids: list[int] = []
    text_positions: list[int] = []
    block: list[int] = []
    labels: list[int] = []
    early_labels: list[int] = []
    for number, index in enumerate(drawn):
        question_ids = tokenize(f"{candidates[index].text} ASSISTANT:")
        answer_ids = [*tokenize(candidates[index].answer), _END]
        length = len(question_ids) + len(answer_ids) - 1
        ids += [*question_ids, *answer_ids[:-1]]
        labels += [*[IGNORE] * (len(question_ids) - 1), *answer_ids]
        n_early = len(_AFTER_QUESTION)
        early = [*[IGNORE] * (len(question_ids) - 1 - n_early), *[answer_ids[0]] * n_early]
        early_labels += [*early, *[IGNORE] * len(answer_ids)]
        text_positions += range(text_start, text_start + length)
        block += [number] * length
    texts = (np.array(values) for values in (ids, text_positions, block, labels, early_labels))
    return Prompt(order[stays], positions, *texts)


def _base_weight(question: Question) -> float:
    """Return 1 for a question about a single item, which exists once per item, and 2 for every other question."""
    return 1.0 if len(question.about) == 1 and question.type != "count" else 2.0


TOKENIZER = make_tokenizer()
_END = int(TOKENIZER.eos_token_id)
START: list[int] = TOKENIZER("USER: <image>")["input_ids"][:-1]
_PREFIX_LENGTH = len(START)
_AFTER_QUESTION: list[int] = TOKENIZER("? ASSISTANT:", add_special_tokens=False)["input_ids"]
"""Ids of the tokens after the last word of a question."""


def make_cached_tokenizer(tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> Callable[[str], list[int]]:
    """Return a function from text to token ids that caches its results."""
    cache: dict[str, list[int]] = {}

    def tokenize(text: str) -> list[int]:
        if text not in cache:
            cache[text] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return cache[text]

    return tokenize
