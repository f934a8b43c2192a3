"""The embedded model of boards and pages: its files, its answers and the sign of its text tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel

from research.mini_training.evaluate import answer_questions, held_out_samples, measure_accuracy
from research.mini_training.evaluate_text import measure_auc
from tokenprune.models import mini
from tokenprune.models.mini.pages import make_demo

NAME = "mini-pages"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(mini.path(NAME), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(mini.path(NAME))


@pytest.fixture(scope="module")
def clip() -> Any:
    return CLIPModel.from_pretrained(mini.text_path(NAME)).eval()


def test_the_files_are_small() -> None:
    files = [*mini.path(NAME).iterdir(), *mini.text_path(NAME).iterdir()]
    assert sum(file.stat().st_size for file in files) < 12_000_000


def test_the_text_tower_belongs_to_the_vision_tower(model: Any, clip: Any) -> None:
    actual, expected = clip.vision_model.state_dict(), model.model.vision_tower.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items() if "post_layernorm" not in name)


@pytest.mark.parametrize(("world", "least"), [("pages", 0.75), pytest.param("boards", 0.8, marks=pytest.mark.slow)])
def test_answers_about_new_images(model: Any, processor: Any, world: str, least: float) -> None:
    right = measure_accuracy(model, processor, held_out_samples(40, start=200, world=world))["all"]
    assert sum(right) / len(right) > least


def test_patches_that_show_a_question_are_less_similar_to_it(clip: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(mini.text_path(NAME))
    for world in ("boards", "pages"):
        shares = measure_auc(clip, tokenizer, world=world, count=2)
        assert shares["background"][0] < 0.25
        assert shares["tile"][0] > shares["tile by chance"][0] + 0.3


def test_the_demo_page_is_held_out_and_its_questions_are_answered(model: Any, processor: Any) -> None:
    page, questions = make_demo(), mini.demo_questions(NAME)
    assert page.split == "heldout"
    with Image.open(mini.image_path(NAME)) as image:
        assert np.array_equal(np.asarray(image), page.pixels)
        answers = answer_questions(model, processor, image, [question["question"] for question in questions])
    assert [question["question"] for question in questions] == [question.text for question in page.questions]
    correct = [answer == question["answer"] for answer, question in zip(answers, questions, strict=True)]
    assert sum(correct) >= 0.8 * len(correct)


@pytest.mark.parametrize("name", mini.MODELS)
def test_a_notice_names_the_images_of_the_training(name: str, tmp_path: Any) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"no demo image")
    assert f"({name}) was trained on {mini.MODELS[name]} only" in mini.describe_limits(photo, name)
    assert not mini.describe_limits(mini.image_path(), name)
    assert not mini.describe_limits(mini.image_path(name), name)
    assert not mini.describe_limits(photo, "llava-hf/llava-v1.6-vicuna-7b-hf")
