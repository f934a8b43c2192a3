"""Metrics against values computed by hand from their definitions."""

from __future__ import annotations

import pytest

from tokenprune.experiments.evaluation.metrics import (
    METRICS,
    anls,
    contains,
    exact_match,
    relaxed_accuracy,
    token_f1,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        (exact_match, " Red. ", ["red"], 1.0),
        (exact_match, "3 6", ["36"], 1.0),
        (exact_match, "reddish", ["red"], 0.0),
        (contains, "It says STOP here", ["stop"], 1.0),
        (contains, "stopping", ["stop"], 0.0),
        (anls, "hello", ["hello"], 1.0),
        (anls, "hallo", ["hello", "x"], 0.8),
        (anls, "abc", ["xyz"], 0.0),
        (relaxed_accuracy, "104", ["100"], 1.0),
        (relaxed_accuracy, "106", ["100"], 0.0),
        (relaxed_accuracy, "50%", ["0.5"], 1.0),
        (relaxed_accuracy, "1,000", ["1000"], 1.0),
        (relaxed_accuracy, "0", ["0"], 1.0),
        (relaxed_accuracy, "Blue", ["blue"], 1.0),
        (vqa_accuracy, "red", ["red"] * 10, 1.0),
        (vqa_accuracy, "the red", ["red"] * 3 + ["blue"] * 7, 0.9),
        (vqa_accuracy, "red", ["red"] + ["blue"] * 9, 0.3),
        (vqa_accuracy, "red", ["blue"] * 10, 0.0),
        (token_f1, "a red star", ["red star"], 0.8),
        (token_f1, "blue", ["red star"], 0.0),
    ],
)
def test_scores_computed_by_hand(metric, prediction: str, answers: list[str], score: float) -> None:
    assert metric(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize("name", METRICS)
def test_scores_range_from_zero_to_one(name: str) -> None:
    assert METRICS[name]("right", ["right"]) == 1.0
    assert METRICS[name]("quite another thing", ["right"]) == 0.0
    assert METRICS[name]("", ["right"]) == 0.0


def test_a_minus_is_no_punctuation() -> None:
    assert exact_match("-5", ["5"]) == 0.0
    assert exact_match(" -5. ", ["-5"]) == exact_match("(-5)", ["-5"]) == 1.0
    assert exact_match("- a star", ["a star"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "equal"),
    [
        ("two", "2", True),
        ("None", "0", True),
        ("1,000", "1000", True),
        ("dont walk", "don't walk", True),
        ("couldnt've", "couldn't've", True),
        ("its", "it's", False),
        ("3 5", "3.5", False),
        ("3.5", "3.5", True),
        ("St. John", "st john", True),
        ("a red, round ball.", "red round ball", True),
        ("ping-pong", "ping pong", True),
        ("yes!", "yes", True),
        ("the an a", "", True),
        ("red,blue", "red blue", True),
        ("3.", "3", True),
        ("ows'at", "'ow's'at", False),
        ("'ows'at", "'ow's'at", True),
        ("somebody'd", "somebodyd", True),
        # Contractions that the official table lists only with all their apostrophes, or not at all.
        ("im", "i'm", False),
        ("shes", "she's", False),
        ("thatd", "that'd", False),
        ("couldntve", "couldn't've", False),
    ],
)
def test_vqa_answers_are_normalized_like_the_official_code(prediction: str, answer: str, equal: bool) -> None:
    assert vqa_accuracy(prediction, [answer] * 10) == float(equal)


def test_vqa_accuracy_averages_over_omitted_annotators() -> None:
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)
    assert vqa_accuracy("red", ["red"] * 4 + ["blue"] * 6) == 1.0
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
