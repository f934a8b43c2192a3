"""The embedded model: its boards, its checkpoint and its training."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration

from research.heldout import board_interval, measure_strategies
from research.mini_training import train as training
from research.mini_training.build import make_config, make_tokenizer
from research.mini_training.evaluate import answer_questions, held_out_samples
from research.mini_training.lessons import (
    PLACES,
    TOKENS,
    is_answerable,
    make_lesson,
    make_tiles,
    pack_positions,
)
from research.mini_training.prompts import draw_kept, make_cached_tokenizer
from tokenprune.models import mini
from tokenprune.models.mini.boards import (
    COLORS,
    GRIDS,
    PAPERS,
    SHAPES,
    TILE,
    Board,
    Question,
    boards,
    make_board,
    make_demo,
)
from tokenprune.strategies import HiRED, Random


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(mini.path())


# --- boards -----------------------------------------------------------------------------------------------------------


def contents(board: Board) -> frozenset[tuple[int, int, int]]:
    return frozenset((item.shape, item.color, item.number) for item in board.items)


def test_boards_are_determined_by_seed_and_split() -> None:
    first, second = make_board(5, "train"), make_board(5, "train")
    assert np.array_equal(first.pixels, second.pixels)
    assert first.questions == second.questions
    assert not np.array_equal(first.pixels, make_board(5, "heldout").pixels)


def test_splits_share_no_board() -> None:
    split_contents = {split: {contents(board) for board in boards(300, split)} for split in ("train", "heldout")}
    assert not split_contents["train"] & split_contents["heldout"]
    assert len(split_contents["heldout"]) > 250


def test_boards_have_the_documented_properties() -> None:
    shares, padded = [], 0
    for board in boards(200):
        rows, cols = board.grid
        assert board.grid in GRIDS
        height, width = board.pixels.shape[:2]
        assert height <= rows * TILE
        assert width <= cols * TILE
        padded += (height, width) != (rows * TILE, cols * TILE)
        for kind in ("shape", "color"):
            values = [getattr(item, kind) for item in board.items]
            assert len(set(values)) == len(values)
        for item in board.items:
            top, left, bottom, right = (value + board.offset[k % 2] for k, value in enumerate(item.box))
            assert top // TILE == (bottom - 1) // TILE
            assert left // TILE == (right - 1) // TILE
        for a, b in combinations([item.box for item in board.items], 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        shares.append(
            sum((item.box[2] - item.box[0]) * (item.box[3] - item.box[1]) for item in board.items) / (height * width)
        )
    assert 0.15 < padded / 200 < 0.35
    assert np.mean(shares) < 0.12


def expected_answer(board: Board, question: Question) -> str:
    """Return the answer to a question, computed from the items of the board."""
    height, width = board.pixels.shape[:2]
    if question.type == "count":
        return str(len(board.items))
    if question.type == "paper":
        return PAPERS[board.paper]
    item = board.items[question.about[0]]
    y, x = item.center
    return {
        "color": COLORS[item.color],
        "shape": SHAPES[item.shape],
        "side": "left" if x < width / 2 else "right",
        "height": "top" if y < height / 2 else "bottom",
    }.get(question.type, str(item.number))


def test_answers_agree_with_the_items() -> None:
    kinds = set()
    for board in boards(60):
        for question in board.questions:
            kinds.add(question.type)
            assert question.answer == expected_answer(board, question)
            if question.type != "count":
                for item in (board.items[number] for number in question.about):
                    mentions = (SHAPES[item.shape] in question.text) + (COLORS[item.color] in question.text)
                    assert mentions == (2 if question.type in ("number_pair", "side", "height") else 1)
    numbers = {"number_pair", "number_shape", "number_color"}
    assert kinds == numbers | {"color", "shape", "count", "paper", "side", "height"}


def test_the_demo_is_a_held_out_board() -> None:
    board = make_demo()
    assert board.split == "heldout"
    assert board.grid == (2, 2)
    with Image.open(mini.image_path()) as image:
        assert np.array_equal(np.asarray(image), board.pixels)
    assert [question["question"] for question in mini.demo_questions()] == [
        question.text for question in board.questions
    ]


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_small_and_has_transformers_classes(model: Any, processor: Any) -> None:
    assert sum(file.stat().st_size for file in mini.path().iterdir()) < 8_000_000
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert type(processor).__name__ == "LlavaNextProcessor"
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")


def test_the_model_answers_the_demo_questions(model: Any, processor: Any) -> None:
    with Image.open(mini.image_path()) as image:
        questions = mini.demo_questions()
        answers = answer_questions(model, processor, image, [question["question"] for question in questions])
    correct = [answer == question["answer"] for answer, question in zip(answers, questions, strict=True)]
    assert sum(correct) >= len(correct) - 1


def test_accuracy_depends_on_the_selection() -> None:
    """The limits are far below the accuracies on 2,439 questions: full 97, HiRED 96, random 73 to 78 at 20 %."""
    random = {f"Random, seed {seed}": Random.seeded(seed=seed) for seed in range(3)}
    results = measure_strategies(1000, 6, (0.2,), {"HiRED": HiRED(), **random})
    share = {key[0]: board_interval(results.answers_of(key))[0] for key in results.right}
    assert share["full"] > 0.9
    assert share["HiRED"] > 0.87
    assert share["HiRED"] > max(share[f"Random, seed {seed}"] for seed in range(3)) + 0.05
    assert all(asked == kept for asked, kept in results.tokens["HiRED", 0.2])


def test_unusual_images_and_questions_are_answered(model: Any, processor: Any) -> None:
    for size in ((1, 1), (500, 30), (37, 411)):
        (answer,) = answer_questions(model, processor, Image.new("RGB", size, "green"), ["Where is the zebra?"])
        assert isinstance(answer, str)


def test_held_out_samples_are_the_questions_of_the_boards() -> None:
    samples = list(held_out_samples(30, start=3))
    assert len(samples) == 30
    questions = [question.text for question in make_board(3).questions]
    assert [sample.question for sample in samples[: len(questions)]] == questions


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_tiles_equal_the_tiles_of_the_processor(processor: Any) -> None:
    sample = list(boards(12, "train"))
    pixels, numbers = make_tiles(sample)
    padded = processor.image_processor(images=[board.image for board in sample], return_tensors="pt")["pixel_values"]
    expected = torch.cat([tiles[:number] for tiles, number in zip(padded, numbers, strict=True)])
    assert (pixels - expected).abs().max() < 1e-5


def test_training_packs_tokens_like_the_model(model: Any) -> None:
    from tokenprune.adapter import find_adapter

    adapter: Any = find_adapter(model)
    for board in boards(30):
        order, line = pack_positions(board)
        layout = adapter.layout(board.pixels.shape[:2])
        assert order.tolist() == layout.packed.tolist()
        rows = layout.newline_index.tolist()
        assert line.tolist() == rows


def test_lessons_mark_the_items() -> None:
    for board in boards(20):
        lesson = make_lesson(board)
        for number, item in enumerate(board.items):
            assert lesson.item_masks[number, 0].any()
            assert lesson.item_masks[number, 1:].any(axis=1).sum() == 1
            assert lesson.digit_masks[:, number].any(axis=2).sum() == 2
            item_mask = lesson.item_masks[number, 0] & (lesson.dense["shape"][0] == item.shape)
            halves = set(lesson.places["side"][0][item_mask].tolist()) - {-100}
            assert halves <= {int(item.center[1] > board.pixels.shape[1] / 2)}
        assert set(lesson.places) == set(PLACES)


def test_questions_are_answerable_if_their_tokens_are_kept() -> None:
    rng = np.random.default_rng(0)
    for board in boards(20):
        lesson = make_lesson(board)
        nothing = np.zeros((1 + board.grid[0] * board.grid[1], TOKENS), dtype=bool)
        base, tiles = nothing.copy(), ~nothing
        base[0], tiles[0] = True, False
        for question in board.questions:
            assert is_answerable(question, lesson, ~nothing)
            assert is_answerable(question, lesson, nothing) == (question.type == "paper")
            assert is_answerable(question, lesson, base) == (question.needs != "tiles")
            assert is_answerable(question, lesson, tiles) == (question.type not in PLACES)
        assert draw_kept(rng, lesson.item_masks, gaps=True).any()


@pytest.mark.parametrize("step", [0, 300, 1000, 1301, 1821, 1990, 2101, 2319])
def test_all_phases_of_the_recipe_run(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "IMAGES", 2)
    torch.manual_seed(0)
    student: Any = LlavaNextForConditionalGeneration(make_config(make_tokenizer()))
    heads = training.Heads(96, 5)
    loss, scores = training.reader_step(student, heads, make_cached_tokenizer(), 0, step)
    loss.backward()
    assert loss.isfinite()
    assert student.model.language_model.layers[0].mlp.up_proj.weight.grad is not None
    trains_tower = student.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad is not None
    assert trains_tower == ("shape" in scores)
    assert ("side" in scores) == (trains_tower and step >= training.PLACES_FROM)


def test_a_resumed_run_equals_an_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "IMAGES", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training.train(tmp_path / "whole", tower_steps=3, reader_steps=2)
        training.train(tmp_path / "parts", tower_steps=3, reader_steps=2, stop_after=2)
        training.train(tmp_path / "parts", tower_steps=3, reader_steps=2, resume=True)
    finally:
        torch.set_num_threads(threads)
    complete, resumed = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(complete["model"][name], value) for name, value in resumed["model"].items())
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert (tmp_path / "parts" / "checkpoint" / "model.safetensors").is_file()
