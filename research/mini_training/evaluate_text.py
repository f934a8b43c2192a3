"""Measures how well the text tower finds the patches and tiles of a question on held-out boards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from research.mini_training.evaluate import WORLDS
from research.mini_training.lessons import TOKENS, Flags, make_lesson, make_tiles, pack_positions
from research.mini_training.page_lessons import make_page_lesson
from research.mini_training.text_model import embed_features, embed_texts
from tokenprune.models.mini.boards import SHAPES, Board
from tokenprune.models.mini.pages import Page


@torch.no_grad()
def patch_scores(model: Any, tokenizer: Any, board: Board | Page, questions: Sequence[str]) -> Tensor:
    """Return the cosine similarity of every patch of the feature layer and every question.

    Args:
        model: The CLIP model.
        tokenizer: The tokenizer of the text tower.
        board: The board or page.
        questions: The questions.

    Returns:
        The cosines, base tile first, `[questions, tiles, tokens]`.
    """
    hidden = model.vision_model(make_tiles([board])[0], output_hidden_states=True).hidden_states
    local = embed_features(model, hidden[-2][:, 1:])
    return torch.einsum("qd,tpd->qtp", embed_texts(model, tokenizer, questions), local)


@torch.no_grad()
def cls_scores(model: Any, tokenizer: Any, board: Board | Page, questions: Sequence[str]) -> Tensor:
    """Return the cosine similarity of the CLS token of every tile (last layer) and every question, as in CLIP.

    Args:
        model: The CLIP model.
        tokenizer: The tokenizer of the text tower.
        board: The board or page.
        questions: The questions.

    Returns:
        The cosines, base tile first, `[questions, tiles]`.
    """
    cls = model.vision_model(make_tiles([board])[0]).last_hidden_state[:, 0]
    return embed_texts(model, tokenizer, questions) @ embed_features(model, cls).T


def _auc(high: Tensor, low: Tensor) -> float:
    """Return the share of pairs with `high` above `low`, with ties counted as one half."""
    above = (high[:, None] > low).float() + 0.5 * (high[:, None] == low).float()
    return above.mean().item()


UNNAMED = ("largest", "smallest")
"""Types of questions that name neither their item nor a property of it."""


def mark_board_items(board: Board) -> tuple[Flags, Flags]:
    """Return which patches show each item, bool `[items, tiles, tokens]`, and show none, bool `[tiles, tokens]`."""
    truth = make_lesson(board)
    return truth.item_masks, truth.dense["shape"] == len(SHAPES)


def mark_page_items(page: Page) -> tuple[Flags, Flags]:
    """Return which patches show each item, bool `[items, tiles, tokens]`, and show none, bool `[tiles, tokens]`."""
    item_masks = make_page_lesson(page).item_masks
    return item_masks, np.asarray(~item_masks.any(0))


MARK_ITEMS: Mapping[str, Callable[[Any], tuple[Flags, Flags]]] = {"boards": mark_board_items, "pages": mark_page_items}
"""Functions that find the patches of the items of an image, by generator."""


def measure_auc(
    model: Any, tokenizer: Any, start: int = 2000, count: int = 100, world: str = "boards"
) -> dict[str, tuple[float, int]]:
    """Return how well the cosines identify the patches of a question, in the sub-images of held-out boards or pages.

    Args:
        model: The CLIP model.
        tokenizer: The tokenizer of the text tower.
        start: Index of the first image.
        count: Number of images.
        world: ``boards`` or ``pages``.

    Returns:
        Mean area under the ROC curve and number of questions. For questions about one item, the keys name the patches
        that the patches of the item are compared with: ``others`` (all remaining patches), ``background`` (patches
        without an item) and ``items`` (patches of different items). A type of question as key compares with all
        remaining patches. ``tile`` is the share of questions with the item in the sub-image of the best CLS token, and
        ``tile by chance`` the expected share of a random sub-image.
    """
    scores_by_name: dict[str, list[float]] = {}
    for board in WORLDS[world](count, "heldout", start):
        item_masks, empty_patches = MARK_ITEMS[world](board)
        questions = [question for question in board.questions if question.about and question.type not in UNNAMED]
        texts = [question.text for question in questions]
        scores = patch_scores(model, tokenizer, board, texts).flatten(1)
        tile_scores = cls_scores(model, tokenizer, board, texts)[:, 1:]
        order, _ = pack_positions(board)
        positions = order[order >= TOKENS]  # valid tokens of the sub-images
        empty = torch.from_numpy(empty_patches.reshape(-1)[positions])
        packed_masks = torch.from_numpy(item_masks.reshape(len(board.items), -1)[:, positions])
        for question, score, tile_score in zip(questions, scores[:, positions], tile_scores, strict=True):
            about = list(question.about)
            target = packed_masks[about].any(0)
            compared = {question.type: ~target}
            if question.type != "count":
                compared |= {"others": ~target, "background": empty, "items": packed_masks.any(0) & ~target}
                holds = torch.from_numpy(item_masks[about[0], 1:]).any(-1).float()
                scores_by_name.setdefault("tile", []).append(holds[tile_score.argmax()].item())
                scores_by_name.setdefault("tile by chance", []).append(holds.mean().item())
            for name, mask in compared.items():
                if target.any() and mask.any():
                    scores_by_name.setdefault(name, []).append(_auc(score[target], score[mask]))
    return {name: (sum(values) / len(values), len(values)) for name, values in scores_by_name.items()}
