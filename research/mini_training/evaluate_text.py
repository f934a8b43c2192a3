"""Measures how well the text tower finds the patches and tiles of a question on held-out boards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from research.mini_training.lessons import TOKENS, make_lesson, make_tiles, pack_positions
from research.mini_training.text_model import embed_features, embed_texts
from tokenprune.models.mini.boards import SHAPES, Board, make_board


@torch.no_grad()
def patch_scores(model: Any, tokenizer: Any, board: Board, questions: Sequence[str]) -> Tensor:
    """Return the cosine similarity of every patch of the feature layer and every question.

    Args:
        model: The CLIP model.
        tokenizer: The tokenizer of the text tower.
        board: The board.
        questions: The questions.

    Returns:
        The cosines, base tile first, `[questions, tiles, tokens]`.
    """
    hidden = model.vision_model(make_tiles([board])[0], output_hidden_states=True).hidden_states
    local = embed_features(model, hidden[-2][:, 1:])
    return torch.einsum("qd,tpd->qtp", embed_texts(model, tokenizer, questions), local)


@torch.no_grad()
def cls_scores(model: Any, tokenizer: Any, board: Board, questions: Sequence[str]) -> Tensor:
    """Return the cosine similarity of the CLS token of every tile (last layer) and every question, as in CLIP.

    Args:
        model: The CLIP model.
        tokenizer: The tokenizer of the text tower.
        board: The board.
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


def measure_auc(model: Any, tokenizer: Any, start: int = 2000, count: int = 100) -> dict[str, tuple[float, int]]:
    """Return how well the cosines identify the patches of a question, in the sub-images of held-out boards.

    Args:
        model: The CLIP model.
        tokenizer: The tokenizer of the text tower.
        start: Index of the first board.
        count: Number of boards.

    Returns:
        Mean area under the ROC curve and number of questions. For questions about one item, the keys name the patches
        that the patches of the item are compared with: ``others`` (all remaining patches), ``background`` (patches
        without an item) and ``items`` (patches of different items). A type of question as key compares with all
        remaining patches. ``tile`` is the share of questions with the item in the sub-image of the best CLS token, and
        ``tile by chance`` the expected share of a random sub-image.
    """
    scores_by_name: dict[str, list[float]] = {}
    for index in range(start, start + count):
        board = make_board(index, "heldout")
        truth = make_lesson(board)
        questions = [question for question in board.questions if question.about]
        texts = [question.text for question in questions]
        scores = patch_scores(model, tokenizer, board, texts).flatten(1)
        tile_scores = cls_scores(model, tokenizer, board, texts)[:, 1:]
        order, _ = pack_positions(board)
        positions = order[order >= TOKENS]  # valid tokens of the sub-images
        empty = torch.from_numpy(truth.dense["shape"].reshape(-1)[positions]) == len(SHAPES)
        item_masks = torch.from_numpy(truth.item_masks.reshape(len(board.items), -1)[:, positions])
        for question, score, tile_score in zip(questions, scores[:, positions], tile_scores, strict=True):
            about = list(question.about)
            target = item_masks[about].any(0)
            compared = {question.type: ~target}
            if question.type != "count":
                compared |= {"others": ~target, "background": empty, "items": item_masks.any(0) & ~target}
                holds = torch.from_numpy(truth.item_masks[about[0], 1:]).any(-1).float()
                scores_by_name.setdefault("tile", []).append(holds[tile_score.argmax()].item())
                scores_by_name.setdefault("tile by chance", []).append(holds.mean().item())
            for name, mask in compared.items():
                if target.any() and mask.any():
                    scores_by_name.setdefault(name, []).append(_auc(score[target], score[mask]))
    return {name: (sum(values) / len(values), len(values)) for name, values in scores_by_name.items()}
