"""Metrics that score an answer from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from rapidfuzz.distance import Levenshtein

Metric = Callable[[str, Sequence[str]], float]
"""Maps a prediction and the accepted answers to a score."""


def normalize_answer(text: str) -> str:
    """Return a text in lower case, with single spaces and without outer punctuation; a number keeps its minus sign."""
    plain = " ".join(text.lower().split())
    inner = plain.strip(string.punctuation + " ")
    negative = re.match(r"[^\w-]*-\d", plain) is not None
    return f"-{inner}" if negative else inner


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals an answer; letter case, outer punctuation and spaces are ignored."""
    normalized_prediction = normalize_answer(prediction).replace(" ", "")
    return float(any(normalized_prediction == normalize_answer(answer).replace(" ", "") for answer in answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction contains an answer as whole words.

    OCRBench also counts an answer that is part of a word.
    """
    text = normalize_answer(prediction)
    return float(
        any(re.search(rf"(?<!\w){re.escape(normalize_answer(answer))}(?!\w)", text) is not None for answer in answers)
    )


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Return the normalized Levenshtein similarity to the best answer (DocVQA), or 0 if it is below the threshold.

    Its average over all samples is ANLS.

    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019.
    """
    text = " ".join(prediction.lower().split())
    similarities = [Levenshtein.normalized_similarity(text, " ".join(answer.lower().split())) for answer in answers]
    best = max(similarities, default=0.0)
    return best if best >= threshold else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """Return 1 for a number within the tolerance of an answer, or for equal text (ChartQA).

    ChartQA's script reads no thousands separators ("1,000") and compares texts with their outer punctuation.

    Source: Masry et al., "ChartQA", Findings of ACL 2022.
    """

    def parse_number(text: str) -> float | None:
        try:
            return float(text.strip().rstrip("%").replace(",", "")) / (100 if text.strip().endswith("%") else 1)
        except ValueError:
            return None

    predicted = parse_number(prediction)
    for answer in answers:
        expected = parse_number(answer)
        if predicted is not None and expected is not None and expected != 0:
            if abs(predicted - expected) <= tolerance * abs(expected):
                return 1.0
        elif normalize_answer(prediction) == normalize_answer(answer):
            return 1.0
    return 0.0


VQA_NUMBERS: Mapping[str, str] = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
"""Number words that the official VQA evaluation writes as digits."""
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Characters that this evaluation removes or replaces by a space; it treats periods and apostrophes separately."""
# fmt: off
VQA_CONTRACTIONS = (
    "'ow's'at", "'twas", "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't",
    "don't", "hadn't", "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's",
    "isn't", "it'd", "it'd've", "it'll", "ma'am", "might've", "mightn't", "mightn't've", "must've", "mustn't",
    "needn't", "not've", "o'clock", "oughtn't", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've",
    "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's",
    "something'd", "something'd've", "something'll", "that's", "there'd", "there'd've", "there're", "there's",
    "they'd", "they'd've", "they'll", "they're", "they've", "wasn't", "we'd've", "we've", "weren't", "what'll",
    "what're", "what's", "what've", "when's", "where'd", "where's", "where've", "who'd", "who'd've", "who'll",
    "who's", "who've", "why'll", "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all",
    "y'all'd've", "y'all'll", "you'd", "you'd've", "you'll", "you're", "you've",
)
# fmt: on
"""The contractions that the official VQA evaluation completes if one apostrophe is missing."""


def _misspellings(contraction: str) -> Iterator[str]:
    """Yield a contraction with one apostrophe removed, for each of its apostrophes."""
    for index, letter in enumerate(contraction):
        if letter == "'":
            yield contraction[:index] + contraction[index + 1 :]


_FULL_SPELLING: Mapping[str, str] = {
    **{spelling: word for word in VQA_CONTRACTIONS for spelling in _misspellings(word)},
    "somebody'd": "somebodyd",  # the official table has this pair in the other direction
}


def normalize_vqa_answer(text: str) -> str:
    """Return an answer in the normalized form of the official VQA evaluation.

    Number words become digits, articles are removed, and contractions get their apostrophes. If a punctuation mark is
    next to a space in the answer, or if a comma is between digits of the answer, the mark is removed; otherwise it
    becomes a space. A period is removed unless a digit follows.

    Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015; GT-Vision-Lab/VQA, vqaEval.py.
    """
    text = " ".join(text.split())
    has_comma_in_number = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in VQA_PUNCTUATION:
        is_next_to_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if is_next_to_space or has_comma_in_number else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = (VQA_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_FULL_SPELLING.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of VQAv2 and TextVQA: a prediction that three of ten people gave has the full score.

    The score is averaged over all ways of omitting one person. Prediction and answers are normalized by
    `normalize_vqa_answer`. If there is a single answer, the score is 0 or 1.

    Differences from the published scripts: VQAv2 skips the normalization of a question whose ten answers are equal;
    TextVQA removes each comma and question mark and separates ``'s`` before it normalizes.

    Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015.
    """
    predicted, people = normalize_vqa_answer(prediction), [normalize_vqa_answer(answer) for answer in answers]
    if len(people) == 1:
        return float(predicted == people[0])
    matches = [predicted == person for person in people]
    scores = [min(1.0, (sum(matches) - match) / 3) for match in matches]
    return sum(scores) / len(scores) if scores else 0.0


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of common words with the best answer (SQuAD).

    SQuAD's script also removes articles and punctuation inside words; this function removes only outer punctuation.
    """

    def f1(answer: str) -> float:
        predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
        common = sum((Counter(predicted) & Counter(expected)).values())
        return 2 * common / (len(predicted) + len(expected)) if common else 0.0

    return max((f1(answer) for answer in answers), default=0.0)


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "contains": contains,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "vqa_accuracy": vqa_accuracy,
    "f1": token_f1,
}
"""Metrics by name."""
