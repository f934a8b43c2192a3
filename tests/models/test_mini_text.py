"""The text tower of the embedded model: its folder, its accuracy and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPModel

from research.mini_training.captions import ANY, ILLEGIBLE, NOTHING, Caption, draw_caption, match_captions
from research.mini_training.evaluate_text import measure_auc, patch_scores
from research.mini_training.page_captions import draw_page_caption
from research.mini_training.text_model import make_text_model
from research.mini_training.train_text import read_boards, read_pages, train_text
from tokenprune.models import mini
from tokenprune.models.mini.boards import make_board


@pytest.fixture(scope="module")
def clip() -> Any:
    return CLIPModel.from_pretrained(mini.text_path()).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(mini.text_path())


@pytest.fixture(scope="module")
def tower() -> Any:
    return AutoModelForImageTextToText.from_pretrained(mini.path()).model.vision_tower


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_is_small_and_loads_as_a_clip_model(clip: Any) -> None:
    assert sum(file.stat().st_size for file in mini.text_path().iterdir()) < 1_600_000
    assert clip.dtype == torch.float32
    assert clip.visual_projection.out_features == clip.text_projection.out_features


def test_the_vision_tower_equals_the_checkpoint(clip: Any, tower: Any) -> None:
    actual, expected = clip.vision_model.state_dict(), tower.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert name.startswith("post_layernorm") or torch.equal(actual[name], value), name


def test_the_pooled_token_is_the_end_token(clip: Any, tokenizer: Any) -> None:
    texts = ["red star", "What number is on the red star?"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    end = tokenizer.eos_token_id
    assert clip.text_model.eos_token_id == end
    assert end == batch["input_ids"].max()
    assert ((batch["input_ids"] == end).sum(1) == 1).all()
    batch_output = clip.text_model(**batch)
    for row, text in enumerate(texts):
        output = clip.text_model(**tokenizer(text, return_tensors="pt"))
        assert torch.allclose(output.last_hidden_state[0, -1], batch_output.pooler_output[row], atol=1e-5)


def test_long_texts_are_truncated_before_the_end_token(clip: Any, tokenizer: Any) -> None:
    ids = tokenizer("the red star " * 30, truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == clip.config.text_config.max_position_embeddings
    assert ids[0, -1] == tokenizer.eos_token_id


def test_words_have_the_token_ids_of_the_model(tokenizer: Any) -> None:
    question = "What number is on the red star?"
    assert tokenizer(question)["input_ids"][:-1] == AutoTokenizer.from_pretrained(mini.path())(question)["input_ids"]


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_patches_and_tiles_match_their_questions(clip: Any, tokenizer: Any, tower: Any) -> None:
    """The limits are far below the AUC on 100 held-out boards; an untrained text tower does not reach them."""
    auc = measure_auc(clip, tokenizer, start=2000, count=12)
    assert auc["others"][0] > 0.9
    assert auc["items"][0] > 0.85
    assert auc["tile"][0] > auc["tile by chance"][0] + 0.3
    torch.manual_seed(0)
    untrained_auc = measure_auc(make_text_model(tower).eval(), tokenizer, start=2000, count=12)
    assert untrained_auc["items"][0] < 0.7


def test_unknown_words_at_the_start_change_little(clip: Any, tokenizer: Any) -> None:
    board = make_board(2000)
    question = next(question.text for question in board.questions if question.type == "number_pair")
    plain, polite = patch_scores(clip, tokenizer, board, [question, f"Could you tell me: {question}"])
    assert np.corrcoef(plain.flatten(), polite.flatten())[0, 1] > 0.9


# --- training ---------------------------------------------------------------------------------------------------------


def test_captions_match_the_tiles_that_they_describe() -> None:
    nothing = NOTHING
    paper = [0, nothing, nothing, nothing, nothing, 2]
    star = [1, 4, 0, 4, 2, 2]
    coarse = [1, 4, 0, ILLEGIBLE, ILLEGIBLE, 2]
    shows = np.array([[paper, coarse], [paper, star], [paper, paper]])
    any_ = ANY
    captions = [
        Caption("red star", (1, 4, 0, any_, any_, any_)),
        Caption("number 42", (1, any_, any_, 4, 2, any_)),
        Caption("dotted paper", (any_, any_, any_, any_, any_, 2)),
        Caption("the cross", (1, 5, any_, any_, any_, any_)),
    ]
    match, is_legible = match_captions(captions, shows)
    assert match.tolist() == [[True, True, False], [False, True, False], [True] * 3, [False] * 3]
    assert is_legible.tolist() == [[True] * 3, [False, True, True], [True] * 3, [True] * 3]


@pytest.mark.parametrize(("read", "draw"), [(read_boards, draw_caption), (read_pages, draw_page_caption)])
def test_a_caption_matches_its_own_tile(tower: Any, read: Any, draw: Any) -> None:
    cache = read(make_text_model(tower), 6)
    rng = np.random.default_rng(0)
    for _ in range(10):
        captions = [draw(rng, shows) for shows in cache.contents]
        match, is_legible = match_captions(captions, cache.contents)
        assert match.diagonal().all()
        assert is_legible.diagonal().all()
        assert not match.all()


@pytest.mark.parametrize("pages", [0, 3])
def test_the_recipe_runs(pages: int, tmp_path: Path, tower: Any) -> None:
    sign: Any = "opposite" if pages else "aligned"
    trained: Any = train_text(tmp_path, steps=2, boards=4, pages=pages, sign=sign)
    fresh: Any = make_text_model(tower)
    weight = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(trained.vision_model.state_dict()[weight], tower.state_dict()[weight])
    assert trained.text_model.state_dict()[weight].shape == fresh.text_model.state_dict()[weight].shape
    assert len((tmp_path / "text.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "text" / "model.safetensors").is_file()
