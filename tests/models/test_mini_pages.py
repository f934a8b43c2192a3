"""Pages: the dense sheets of the embedded world, their questions and their evidence."""

from __future__ import annotations

from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from research.mini_training import refine_pages as refinement
from research.mini_training import train_pages as training
from research.mini_training.build import SIDE
from research.mini_training.evaluate import answer_questions
from research.mini_training.evaluate_patches import collect_patches, probe_accuracy
from research.mini_training.lessons import make_tiles
from research.mini_training.muon import Muon, orthogonalize
from research.mini_training.page_lessons import is_page_answerable, make_page_lesson
from research.mini_training.prompts import make_cached_tokenizer
from research.mini_training.train import Heads
from tokenprune.models import mini
from tokenprune.models.mini.boards import TILE, Split
from tokenprune.models.mini.glyphs import COLORS
from tokenprune.models.mini.pages import (
    CELL,
    GRIDS,
    LAYOUTS,
    NAMES,
    PLAIN,
    Box,
    Item,
    Page,
    Question,
    list_words,
    make_page,
    pages,
)


@cache
def sample(split: Split = "heldout") -> tuple[Page, ...]:
    return tuple(pages(60, split))


def contents(page: Page) -> tuple[str, frozenset[tuple[int, int, int]]]:
    return page.layout, frozenset((item.name, item.number, item.color) for item in page.items)


def test_pages_are_determined_by_seed_and_split() -> None:
    first, second = make_page(5, "train"), make_page(5, "train")
    assert np.array_equal(first.pixels, second.pixels)
    assert (first.questions, first.items) == (second.questions, second.items)
    assert contents(first) != contents(make_page(5, "heldout")) != contents(make_page(6, "heldout"))


def test_splits_share_no_page() -> None:
    train, heldout = ({contents(page) for page in sample(split)} for split in ("train", "heldout"))
    assert not train & heldout
    assert len(heldout) == len(sample())


def test_pages_have_the_documented_properties() -> None:
    assert {page.grid for page in sample()} == set(GRIDS)
    assert {page.layout for page in sample()} == set(LAYOUTS)
    padded = 0
    for page in sample():
        height, width = page.pixels.shape[:2]
        padded += (height, width) != (TILE * page.grid[0], TILE * page.grid[1])
        assert page.offset == ((TILE * page.grid[0] - height) // 2, (TILE * page.grid[1] - width) // 2)
        assert page.content.shape == (height // CELL, width // CELL)
        assert 0.3 <= page.content.mean() <= 0.6
        assert 8 <= len(page.items) <= 24
        for values in ([item.name for item in page.items], [item.number for item in page.items]):
            assert len(set(values)) == len(values)
        colors = [item.color for item in page.items if item.color != PLAIN]
        assert any(colors.count(color) == 1 for color in colors)
    assert 0.1 < padded / len(sample()) < 0.4


def boxes_of(item: Item) -> list[Box]:
    return [item.label, item.value, item.mark]


def test_items_and_clutter_cover_the_content() -> None:
    """Every item lies inside one tile, no two items overlap, and cells without content show only paper."""
    for page in sample():
        height, width = page.pixels.shape[:2]
        for item in page.items:
            assert len(page.find_tiles([(b - 1, r - 1, b, r) for _, _, b, r in boxes_of(item)])) == 1
            assert page.find_tiles(boxes_of(item)) == page.find_tiles([item.label])
            for top, left, bottom, right in boxes_of(item):
                assert 0 <= top < bottom <= height
                assert 0 <= left < right <= width
                assert page.content[top // CELL : -(-bottom // CELL), left // CELL : -(-right // CELL)].all()
        for a, b in combinations([box for item in page.items for box in boxes_of(item)], 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        cells = page.pixels.reshape(height // CELL, CELL, width // CELL, CELL, 3).astype(float)
        darkest = cells.mean(-1).min((1, 3))
        assert darkest[~page.content].min() > 185
        n_item_cells = sum((r - x) * (b - t) // CELL**2 for item in page.items for t, x, b, r in boxes_of(item))
        assert page.content.sum() > n_item_cells  # the remaining content is clutter or frames


def expected_answer(page: Page, question: Question) -> str:
    """Return the answer to a question, computed from the items of the page and the words of the question."""
    words = question.text.rstrip("?").replace(":", "").split()
    named = [item for item in page.items if NAMES[item.name] in words]
    colored = [item for item in page.items if item.color != PLAIN and COLORS[item.color] in words]
    numbers = sorted(page.items, key=lambda item: item.number)
    if question.type in ("value", "color_value"):
        (item,) = named if question.type == "value" else colored
        return str(item.number)
    if question.type in ("side", "height"):
        (item,) = colored
        axis = int(question.type == "side")
        is_far = (item.mark[axis] + item.mark[axis + 2]) / 2 > page.pixels.shape[axis] / 2
        return (("top", "bottom"), ("left", "right"))[axis][int(is_far)]
    if question.type == "count":
        return str(len(colored))
    if question.type == "name":
        (item,) = (item for item in page.items if str(item.number) in words)
        return NAMES[item.name]
    if question.type == "compare":
        assert len(named) == 2
        return NAMES[max(named, key=lambda item: item.number).name]
    return NAMES[numbers[0 if question.type == "smallest" else -1].name]


def test_answers_and_evidence_agree_with_the_items() -> None:
    types = set()
    for page in sample():
        numbers = sorted(item.number for item in page.items)
        assert min(numbers[1] - numbers[0], numbers[-1] - numbers[-2]) >= 5
        texts = [question.text for question in page.questions]
        assert len(set(texts)) == len(texts)
        for question in page.questions:
            types.add(question.type)
            assert question.answer == expected_answer(page, question)
            assert len(question.text.split()) > 3
            items = [page.items[index] for index in question.about]
            shown = {box for item in items for box in boxes_of(item)}
            assert question.evidence
            assert set(question.evidence) <= shown
            assert len(page.find_tiles(question.evidence)) <= len(items)
            needs_base = question.type in ("side", "height") and page.grid[int(question.type == "side")] > 1
            is_about_marks = question.type in ("side", "height", "count")
            assert question.needs == ("base" if needs_base else "either" if is_about_marks else "tiles")
    assert types == {
        *("value", "name", "color_value", "largest", "smallest", "compare", "count", "side", "height"),
    }


def test_every_word_is_in_the_vocabulary() -> None:
    words = set(list_words())
    for page in sample():
        for question in page.questions:
            text = f"{question.text} {question.answer}".lower().replace("?", " ?").replace(":", " :")
            assert {word for word in text.split() if not word.isdigit()} <= words


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_layout_fills_every_grid(layout: str, grid: tuple[int, int]) -> None:
    for index in range(5):  # a quarter of the pages is smaller than its tiles
        page = make_page(index, "train", grid=grid, layout=layout)  # type: ignore[arg-type]
        assert (page.layout, page.grid) == (layout, grid)
        assert 0.3 <= page.content.mean() <= 0.6


def test_probes_find_what_patches_show() -> None:
    """In pixels, a patch of the tens digit shows the tens digit and not the units digit."""
    pages = [make_page(index) for index in range(60)]
    numbers = torch.tensor([item.number for page in pages for item in page.items])
    boxes = [(page, item.digits[0]) for page in pages for item in page.items]
    patches = [torch.from_numpy(page.pixels[t:b, le:r].astype(np.float32)).flatten() for page, (t, le, b, r) in boxes]
    features = torch.stack(patches)
    assert probe_accuracy(features, numbers // 10) > 0.9
    assert probe_accuracy(features, numbers % 10) < 0.25


def test_collected_patches_belong_to_the_items() -> None:
    model = AutoModelForImageTextToText.from_pretrained(mini.path("mini-pages"), dtype=torch.float32)
    features, words = collect_patches(model, 2)
    pages = [make_page(index, "heldout") for index in range(2)]
    assert words["tens"].tolist() == [item.number // 10 for page in pages for item in page.items]
    assert features["tens"].shape == features["units"].shape == (len(words["name"]), 96)
    assert not torch.equal(features["tens"], features["units"])


def test_patches_of_a_number_show_their_own_digit() -> None:
    model = AutoModelForImageTextToText.from_pretrained(mini.path("mini-pages"), dtype=torch.float32)
    features, words = collect_patches(model, 30)
    for own, other in (("tens", "units"), ("units", "tens")):
        assert probe_accuracy(features[own], words[own]) > 0.95
        assert probe_accuracy(features[own], words[other]) < 0.7


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate_digits", [False, True])
def test_lessons_mark_the_patches_of_the_items(separate_digits: bool) -> None:
    """The marked patches of the sub-images show the ink of the page, and masks of different items are disjoint."""
    for page in sample()[:20]:
        truth = make_page_lesson(page, separate_digits=separate_digits)
        tiles, _ = make_tiles([page])
        patches = tiles.mean(1).unflatten(1, (SIDE, CELL)).unflatten(3, (SIDE, CELL)).amin((2, 4)).flatten(1).numpy()
        assert patches[1:][truth.digit_masks[:, :, 1:].any((0, 1))].max() < patches[1:].max() - 0.3
        assert (truth.item_masks[:, 1:].sum(0) <= 1).all()
        for number, item in enumerate(page.items):
            tens, units = truth.digit_masks[:, number]
            assert tens.sum() == units.sum() == (1 if separate_digits else 2)
            assert (tens == units).all() != separate_digits
            assert (tens | units).sum() == 2
            assert set(truth.dense["tens"][tens]) == {item.number // 10}
            assert set(truth.dense["units"][units]) == {item.number % 10}
            assert set(truth.dense["units"][tens & ~units]) <= {10}
            assert (truth.dense["name"] == item.name).sum() == 5
            on_item = truth.dense["color"][truth.item_masks[number] & (np.arange(len(tiles)) > 0)[:, None]]
            assert set(on_item) == {item.color}


def test_page_questions_are_answerable_if_their_tokens_are_kept() -> None:
    for page in sample()[:20]:
        truth = make_page_lesson(page, separate_digits=True)
        everything = np.ones(truth.item_masks.shape[1:], dtype=bool)
        base, tiles = everything.copy(), everything.copy()
        base[1:], tiles[0] = False, False
        for question in page.questions:
            assert not is_page_answerable(question, truth, ~everything)
            assert is_page_answerable(question, truth, everything)
            assert is_page_answerable(question, truth, tiles) == (question.type not in ("side", "height"))
            if question.needs == "tiles":
                assert not is_page_answerable(question, truth, base)
                assert not is_page_answerable(question, truth, ~truth.digit_masks[0].any(0))
                both = make_page_lesson(page)
                assert is_page_answerable(question, both, ~truth.digit_masks[0].any(0))


@pytest.mark.parametrize("step", [0, training.ALIGN_UNTIL, training.SPARSE_UNTIL + 7, training.TOGETHER_FROM])
def test_all_phases_of_the_recipe_run(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "IMAGES", 2)
    torch.manual_seed(0)
    model = training.load_start(mini.path())
    heads = nn.ModuleDict({"pages": training.PageHeads(96, 5), "boards": Heads(96, 5)})
    loss, scores = training.reader_step(model, heads, make_cached_tokenizer(training.TOKENIZER), 0, step)
    loss.backward()
    assert loss.isfinite()
    trains_tower = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad is not None
    assert trains_tower == (step >= training.TOGETHER_FROM)
    assert ("boards_right" in scores) == (step % 4 == 3)
    assert ("pages_right" in scores) == (step >= training.ALIGN_UNTIL and step % 4 < 3)
    assert "aligned" in scores
    trains_llm = model.model.language_model.layers[0].mlp.up_proj.weight.grad is not None
    assert trains_llm == (step >= training.ALIGN_UNTIL)


def test_training_starts_with_the_tower_of_a_checkpoint_and_a_lookup() -> None:
    """A word matches the patches that are aligned with it, not itself, and reads the words that they show."""
    shipped = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32)
    torch.manual_seed(0)
    model = training.load_start(mini.path())
    tower = model.model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], value) for name, value in shipped.model.vision_tower.state_dict().items())
    attention, half = model.model.language_model.layers[0].self_attn, training.HEAD_DIM // 2
    is_slow = (torch.arange(training.HEAD_DIM) % half >= half // 2).repeat(4)
    query, key, value, output = (getattr(attention, f"{kind}_proj").weight[:] for kind in "qkvo")
    words = torch.randn(5, 128)
    patches = words @ training.make_rotation(128).T
    queries = words @ query[is_slow].T
    logits, among_words = (queries @ (keys @ key[is_slow].T).T for keys in (patches, words))
    is_other = ~torch.eye(len(words), dtype=torch.bool)
    assert logits.diagonal().min() > 2 * max(logits[is_other].abs().max(), among_words.abs().max())
    read = patches @ value[is_slow].T @ output[:, is_slow].T
    assert torch.allclose(read, training.COPY_SCALE * words, atol=1e-5)


def test_the_match_loss_trains_words_to_attend_to_their_patches() -> None:
    torch.manual_seed(0)
    model = training.load_start(mini.path())
    tokenize = training.make_cached_tokenizer(training.TOKENIZER)
    batch = training.draw_pages(
        np.random.default_rng(0), [0], 2, tokenize, gaps=False, sparse=False, weights=training.QUESTION_WEIGHTS
    )
    with torch.no_grad():
        hidden = training.tower_output(model, batch.pixels)
        features = model.model.multi_modal_projector(hidden[-2][:, 1:]).split(batch.tiles)
    attention = model.model.language_model.layers[0].self_attn
    optimizer = torch.optim.Adam([attention.q_proj.weight, attention.k_proj.weight], lr=0.01)
    shares = []
    for _ in range(20):
        loss, share = training.match_loss(model, features, batch)
        shares.append(share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shares[-1] > 2 * shares[0]


def test_a_page_without_remaining_evidence_is_trained_with_all_tokens() -> None:
    step, images = 812, training.IMAGES  # the first step of the recipe in which the evidence of a page is removed
    start = training._INDEX_STEP // 2 + images * step
    batch = training.draw_pages(
        np.random.default_rng((0, 2, step)),
        range(start, start + images),
        2,
        training.make_cached_tokenizer(training.TOKENIZER),
        gaps=True,
        sparse=False,
        weights=training.QUESTION_WEIGHTS,
    )
    assert all(len(prompt.labels) for prompt in batch.prompts)


@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_all_kinds_of_refinement_steps_run(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "IMAGES", 2)
    torch.manual_seed(0)
    model = refinement.load_start(mini.path("mini-pages"), mini.path())
    loss, scores = refinement.refine_reader(model, make_cached_tokenizer(training.TOKENIZER), step)
    loss.backward()
    assert loss.isfinite()
    assert ("boards_right" in scores) == (step in (0, 3))
    assert scores["gaps"] == (step in (0, 4))
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad is None
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("rows", [6, 20])
def test_muon_equals_the_one_of_torch_up_to_its_precision(rows: int) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(3, rows, 10)
    values = torch.linalg.svdvals(orthogonalize(gradients[0]))
    assert 0.6 < values.min() < values.max() < 1.3
    results = []
    for make in (Muon, partial(torch.optim.Muon, weight_decay=0.0)):
        matrix = nn.Parameter(torch.zeros(rows, 10))
        optimizer = make([matrix], lr=0.02)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        results.append(matrix.detach())
    assert results[0].abs().mean() > 0.005
    assert torch.allclose(*results, atol=1e-3)


@pytest.mark.parametrize(
    ("module", "train", "options"),
    [
        (training, training.train_pages, {"start": mini.path(), "tower_steps": 1, "reader_steps": 2}),
        (
            refinement,
            refinement.refine_pages,
            {"start": mini.path("mini-pages"), "tower": mini.path(), "tower_steps": 1, "projector_steps": 2}
            | {"reader_steps": 1},
        ),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_run(
    module: Any, train: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("IMAGES", "PAGES", "BOARDS"):
        monkeypatch.setattr(module, name, 1)
    train(tmp_path / "complete", **options)
    train(tmp_path / "resumed", **options, stop_after=2)
    for other in ({"tower_steps": 2}, {"tower_steps": 0, "projector_steps": 0, "reader_steps": 1}):
        known = {name: value for name, value in other.items() if name in options}
        with pytest.raises(ValueError, match=r"saved after 2 steps of stages that end at \[1, 3"):
            train(tmp_path / "resumed", **options | known, resume=True)
    train(tmp_path / "resumed", **options, resume=True)
    complete, resumed = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("complete", "resumed")
    )
    assert all(torch.equal(complete["model"][name], value) for name, value in resumed["model"].items())
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "resumed" / "checkpoint")
    processor = AutoProcessor.from_pretrained(tmp_path / "resumed" / "checkpoint")
    (answer,) = answer_questions(model, processor, make_page(0, grid=(2, 3)).image, ["What number is on the tea?"])
    assert isinstance(answer, str)
