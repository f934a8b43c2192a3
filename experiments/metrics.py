"""Metrics: how good an answer is, from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rapidfuzz.distance import Levenshtein

Metric = Callable[[str, Sequence[str]], float]
"""From a prediction and the accepted answers to a score."""


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation at its ends and with single spaces; a number keeps its minus."""
    plain = " ".join(text.lower().split())
    inner = plain.strip(string.punctuation + " ")
    negative = re.match(r"[^\w-]*-\d", plain) is not None
    return f"-{inner}" if negative else inner


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction is one of the answers, letter case, outer punctuation and spaces aside."""
    given = normalised(prediction).replace(" ", "")
    return float(any(given == normalised(answer).replace(" ", "") for answer in answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if one of the answers stands in the prediction as whole words, as OCRBench counts."""
    given = normalised(prediction)
    return float(
        any(re.search(rf"(?<!\w){re.escape(normalised(answer))}(?!\w)", given) is not None for answer in answers)
    )


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Return the average normalised Levenshtein similarity (DocVQA): the best answer counts, below the threshold none.

    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019.
    """
    given = " ".join(prediction.lower().split())
    similar = [Levenshtein.normalized_similarity(given, " ".join(answer.lower().split())) for answer in answers]
    best = max(similar, default=0.0)
    return best if best >= threshold else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """Return 1 for a number within 5 % of an answer, or the same text (ChartQA).

    Source: Masry et al., "ChartQA", Findings of ACL 2022.
    """

    def number(text: str) -> float | None:
        try:
            return float(text.strip().rstrip("%").replace(",", "")) / (100 if text.strip().endswith("%") else 1)
        except ValueError:
            return None

    given = number(prediction)
    for answer in answers:
        wanted = number(answer)
        if given is not None and wanted is not None and wanted != 0:
            if abs(given - wanted) <= tolerance * abs(wanted):
                return 1.0
        elif normalised(prediction) == normalised(answer):
            return 1.0
    return 0.0


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of VQAv2 and TextVQA: three people of ten who agree make a full score.

    Averaged over all ways of leaving one person out. Words are compared without articles and punctuation.

    Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015.
    """

    def plain(text: str) -> str:
        words = re.sub(rf"[{re.escape(string.punctuation)}]", " ", text.lower()).split()
        return " ".join(word for word in words if word not in ("a", "an", "the"))

    given, people = plain(prediction), [plain(answer) for answer in answers]
    if len(people) == 1:
        return float(given == people[0])
    matches = [given == person for person in people]
    left_out = [min(1.0, (sum(matches) - match) / 3) for match in matches]
    return sum(left_out) / len(left_out) if left_out else 0.0


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of words in common with the best answer (SQuAD)."""

    def f1(answer: str) -> float:
        given, wanted = normalised(prediction).split(), normalised(answer).split()
        common = sum((Counter(given) & Counter(wanted)).values())
        return 2 * common / (len(given) + len(wanted)) if common else 0.0

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
