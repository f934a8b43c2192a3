"""Trains one model for boards and pages from the shipped weights: ``python -m research.mini_training.train_pages``.

Stage 1 trains the vision tower. Heads on the CLS token after every layer classify the content of a tile, and heads on
every patch of the feature layer classify the content of the patch, see `page_lessons`. Boards are repeated with their
heads, so that the tower does not forget them. No loss applies to the attention. The heads are discarded. Stage 2 trains
the projector and the LLM to answer questions about pages in two of three steps, and about boards in the third. The
tower is frozen at first and trained again at the end, in steps with all tokens and with the losses of stage 1.

As for boards, random visual tokens are removed in a part of the steps (`lessons.draw_subset`), independent of
strategies, attention and scores.

Data, subsets and order depend only on the seed and the step. A run saves its state every few minutes and after the
last step; the same command with ``--resume`` continues it.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlavaNextForConditionalGeneration

from research.mini_training.build import make_config, make_tokenizer
from research.mini_training.lessons import IGNORE, make_lesson, make_tiles, pack_positions
from research.mini_training.page_lessons import (
    PAGE_DENSE,
    PAGE_PLACES,
    PAGE_PRESENCE,
    PageLesson,
    is_page_answerable,
    make_page_lesson,
)
from research.mini_training.prompts import Prompt, assemble_prompt, draw_kept, make_cached_tokenizer, make_prompt
from research.mini_training.stages import Stage, run_stages
from research.mini_training.train import Heads, answer_loss, make_optimizers, tower_output
from tokenprune.models import mini
from tokenprune.models.mini.boards import GRIDS as BOARD_GRIDS
from tokenprune.models.mini.boards import SHAPES, make_board
from tokenprune.models.mini.glyphs import COLORS
from tokenprune.models.mini.pages import GRIDS, NAMES, Page, list_words, make_page

PAGES, BOARDS = 8, 4
"""Number of pages and boards in a step of stage 1."""
IMAGES = 8
"""Number of images in a step of stage 2."""
QUESTIONS = 20
"""Largest number of questions about each page in a step of stage 2."""
HEAD_DIM = 64
"""Dimensions of an attention head of the LLM; the shipped model has 32."""
MATCH_SCALE = 0.1
"""Standard deviation of the weights of new dimensions of queries and keys."""
COPY_SCALE = 0.1
"""Scale of the embeddings that the new dimensions of values read."""
EARLY_WEIGHT = 0.3
"""Weight of the loss on early labels, see `answer_loss`."""
TOWER_STEPS = 1000
READER_STEPS = 3600
ALIGN_UNTIL = 150
"""Before this step of stage 2, only projector and embeddings are trained, with the loss of `alignment_loss`."""
LOOKUP_UNTIL = 450
"""Before this step of stage 2, pages have two sub-images, and most questions look up the number of an item. Without
this phase, lookups are not learned in many hundred steps."""
SPARSE_UNTIL = 800
"""Before this step of stage 2, pages keep the patches of items and few others. A lookup among few tokens is learned
faster, and the sequences are shorter."""
BACKGROUND_RATE = 0.03
"""Share of the other patches in these steps."""
TOGETHER_FROM = 1800
"""From this step of stage 2, the tower is trained in steps without removed tokens."""
MATCH_FROM = 2353
"""From this step of stage 2, `match_loss` is part of the loss. Before, the second digit of a number was not used."""
MATCH_WEIGHT = 0.3
"""Weight of this loss."""
MATCH_HEADS = 2
"""Number of attention heads that it trains."""
ALIGNMENT_WEIGHT = 0.3
"""Weight of the loss that aligns projected patches with the words that they show."""
TOWER_RATES = ((0, 0.05), (19, 0.5), (600, 0.5), (TOWER_STEPS, 0.02))
"""Factors of the learning rate in stage 1 as (step, factor), with linear interpolation."""
READER_RATES = (
    (0, 0.05),
    (19, 0.5),
    (800, 0.5),
    (1800, 0.3),
    (2650, 0.16),
    (2670, 0.5),
    (3150, 0.4),
    (READER_STEPS, 0.01),
)
"""Factors of the learning rate in stage 2."""
QUESTION_WEIGHTS = {
    **dict.fromkeys(("value", "name", "compare"), 4.0),
    **dict.fromkeys(("color_value", "largest", "smallest", "side", "height", "count"), 2.0),
}
"""Weights of question types in stage 2."""
LOOKUP_WEIGHTS = {**dict.fromkeys(QUESTION_WEIGHTS, 0.25), "value": 8.0, "color_value": 1.0, "name": 1.0}
"""Weights of question types before `LOOKUP_UNTIL`."""
_LATE_WEIGHTS = {"name": 12.0, "count": 8.0, "color_value": 4.0, "value": 3.0, "compare": 2.0, "largest": 1.0}
_LATE_WEIGHTS |= {"smallest": 1.0, "side": 1.5, "height": 1.5}
WEIGHTS: tuple[tuple[int, Mapping[str, float]], ...] = (
    (0, LOOKUP_WEIGHTS),
    (LOOKUP_UNTIL, QUESTION_WEIGHTS),
    (2030, _LATE_WEIGHTS | {"name": 16.0, "count": 6.0, "color_value": 3.0, "value": 2.0, "side": 1.0, "height": 1.0}),
    (2650, _LATE_WEIGHTS),
)
"""Weights of question types in stage 2 as (first step, weights). Later, types with few right answers prevail."""
MAX_PER_TYPE = 12
"""Largest number of questions of each type about a page of stage 2, of which `QUESTIONS` are drawn."""
TOKENIZER = make_tokenizer(list_words())
WORD_IDS: dict[str, Any] = {
    "name": TOKENIZER.convert_tokens_to_ids(list(NAMES)),
    "shape": TOKENIZER.convert_tokens_to_ids(list(SHAPES)),
    "color": TOKENIZER.convert_tokens_to_ids(list(COLORS)),
    "tens": TOKENIZER.convert_tokens_to_ids([str(digit) for digit in range(10)]),
    "units": TOKENIZER.convert_tokens_to_ids([f"##{digit}" for digit in range(10)]),
}
"""Token ids of the classes of each head of `PAGE_DENSE` and `DENSE` that are words; the last class is no word."""
_INDEX_STEP = 100_000_000
"""Distance of the first image of two seeds; half of it separates the stages."""


@dataclass(frozen=True)
class Batch:
    """The images of one step of stage 2.

    Attributes:
        world: ``boards`` or ``pages``.
        pixels: All tiles, `[tiles, 3, height, width]`.
        tiles: Number of tiles of each image.
        truths: Ground truth of each image, a `Lesson` or a `PageLesson`.
        prompts: Training sequence of each image.
    """

    world: str
    pixels: Tensor
    tiles: list[int]
    truths: Sequence[Any]
    prompts: Sequence[Prompt]


class PageHeads(nn.Module):
    """Classification heads for pages; they are not part of the model."""

    def __init__(self, width: int, layers: int, place_weight: float = 0.5) -> None:
        super().__init__()
        self.place_weight = place_weight
        self.dense = nn.Linear(width, sum(PAGE_DENSE.values()))
        self.places = nn.Linear(width, sum(PAGE_PLACES.values()))
        n_presence = sum(PAGE_PRESENCE.values())
        self.cls = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_presence)) for _ in range(layers)
        )
        self.weights = [0.3] * (layers - 2) + [1.0] * 2

    def forward(self, hidden: Sequence[Tensor], lessons: Sequence[PageLesson]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of the tower and the accuracy of each head.

        Args:
            hidden: CLS and patch tokens after the embeddings and after each layer, `[tiles, 1 + tokens, width]` each.
            lessons: The ground truth of the pages that the tiles belong to.

        Returns:
            The loss, and the accuracy by head.
        """
        patches = hidden[-2][:, 1:]
        loss, scores = hidden[0].new_zeros(()), {}
        parts = self.dense(patches).flatten(0, 1).split(list(PAGE_DENSE.values()), dim=1)
        for name, logits in zip(PAGE_DENSE, parts, strict=True):
            target = torch.from_numpy(np.concatenate([lesson.dense[name] for lesson in lessons])).flatten()
            weight = torch.ones(logits.shape[1])
            weight[-1] = 0.2  # Most patches show none of the classes; without a weight, this class would dominate.
            loss = loss + F.cross_entropy(logits, target, weight=weight, ignore_index=IGNORE)
            is_scored = (target != IGNORE) & (target != logits.shape[1] - 1)
            scores[name] = (logits.argmax(1) == target)[is_scored].float().mean().item()
        is_base = torch.cat([torch.arange(len(lesson.dense["name"])) == 0 for lesson in lessons])
        parts = self.places(patches[is_base]).flatten(0, 1).split(list(PAGE_PLACES.values()), dim=1)
        for name, logits in zip(PAGE_PLACES, parts, strict=True):
            target = torch.from_numpy(np.concatenate([lesson.places[name] for lesson in lessons]))
            loss = loss + self.place_weight * F.cross_entropy(logits, target, ignore_index=IGNORE)
            scores[name] = (logits.argmax(1) == target)[target != IGNORE].float().mean().item()
        target = torch.from_numpy(
            np.concatenate(
                [np.concatenate([lesson.presence[name] for name in PAGE_PRESENCE], axis=1) for lesson in lessons]
            )
        )[~is_base].float()
        for weight_of_layer, head, layer in zip(self.weights, self.cls, hidden[1:], strict=True):
            logits = head(layer[~is_base, 0])
            loss = loss + weight_of_layer * 8 * F.binary_cross_entropy_with_logits(logits, target)
        scores["cls"] = ((logits > 0) == (target > 0))[target > 0].float().mean().item()
        return loss, scores


def load_start(checkpoint: Path) -> Any:
    """Return a model with the vision tower of a checkpoint, and with a new projector and LLM for boards and pages.

    The LLM of the checkpoint is not continued: its attention is saturated, so that new words are hardly learned. Rotary
    positions leave only the lowest frequencies of a head for lookups that do not depend on the distance. In a head of
    32 dimensions these are about 12 dimensions, hardly enough for 32 names. Half of the dimensions of a larger head
    have frequencies close to zero and start as a lookup, see `add_lookup`.

    Args:
        checkpoint: Folder of the checkpoint.

    Returns:
        The model in float32.
    """
    old: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    model: Any = LlavaNextForConditionalGeneration(make_config(TOKENIZER, GRIDS, HEAD_DIM))
    model.model.vision_tower.load_state_dict(old.model.vision_tower.state_dict())
    for layer in model.model.language_model.layers:
        add_lookup(layer.self_attn, HEAD_DIM)
    return model


@torch.no_grad()
def add_lookup(attention: Any, head_dim: int) -> None:
    """Let the dimensions with the lowest rotary frequencies of an attention layer start as a lookup.

    A word attends to projected patches that show it (see `alignment_loss`), and reads the embeddings of all words that
    these patches show. Training refines the lookup; from random weights it was not learned in several hundred steps.

    Args:
        attention: The attention layer. A half of the dimensions of all heads together are the dimensions of a token.
        head_dim: Dimensions of a head.
    """
    output, query, key, value = (getattr(attention, f"{kind}_proj").weight for kind in "oqkv")
    width, half = output.shape[0], head_dim // 2
    slow = torch.arange(half // 2, half)
    places = torch.cat([slow, half + slow])  # rotary positions pair dimension i with i + head_dim / 2
    match = MATCH_SCALE * torch.randn(width, width)
    copy = torch.linalg.qr(torch.randn(width, width)).Q
    to_embedding = make_rotation(width).T
    parts = (match, match @ to_embedding, copy @ to_embedding, COPY_SCALE * copy)
    for weight, part in zip((query, key, value, output.T), parts, strict=True):
        weight.view(-1, head_dim, width)[:, places] = part.view(-1, half, width)


def make_rotation(width: int) -> Tensor:
    """Return a fixed random orthogonal matrix, `[width, width]`.

    Projected patches are aligned with rotated embeddings of words. A word then finds its patches and not itself.
    """
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q


def tower_step(model: Any, heads: nn.ModuleDict, seed: int, step: int) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step of stage 1."""
    start = _INDEX_STEP * seed + step * PAGES
    pages = [make_page(start + k, "train") for k in range(PAGES)]
    boards = [make_board(start + k, "train", crowded=k % 2 == 0) for k in range(BOARDS)]
    return tower_loss(model, heads, pages, boards)


def tower_loss(
    model: Any,
    heads: nn.ModuleDict,
    pages: Sequence[Page],
    boards: Sequence[Any],
    *,
    board_weight: float = 0.3,
    separate_digits: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of the tower on pages and boards, and the accuracy of each head."""
    pixels, _ = make_tiles([*pages, *boards])
    hidden = tower_output(model, pixels)
    n_page_tiles = sum(1 + page.grid[0] * page.grid[1] for page in pages)
    lessons = [make_page_lesson(page, separate_digits=separate_digits) for page in pages]
    loss, scores = heads["pages"]([part[:n_page_tiles] for part in hidden], lessons)
    board_loss, board_scores = heads["boards"](
        [part[n_page_tiles:] for part in hidden], [make_lesson(board) for board in boards], places=True
    )
    return loss + board_weight * board_loss, scores | {f"board_{name}": value for name, value in board_scores.items()}


def reader_step(
    model: Any, heads: nn.ModuleDict, tokenize: Callable[[str], list[int]], seed: int, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step of stage 2."""
    rng = np.random.default_rng((seed, 2, step))
    start = _INDEX_STEP * seed + _INDEX_STEP // 2 + IMAGES * step
    indices = range(start, start + IMAGES)
    sparse = step < SPARSE_UNTIL
    gaps = sparse or step // 4 % 2 == 1
    trains_tower = not gaps and step >= TOGETHER_FROM
    sub_images = 2 if step < LOOKUP_UNTIL else (4, 2, 6, 3)[step // 8 % 4]
    if step % 4 == 3:
        batch = draw_boards(rng, indices, sub_images, tokenize, gaps=gaps, weights={})
    else:
        weights = next(weights for start, weights in reversed(WEIGHTS) if step >= start)
        batch = draw_pages(rng, indices, sub_images, tokenize, gaps=gaps, sparse=sparse, weights=weights)
    with torch.set_grad_enabled(trains_tower):
        hidden = tower_output(model, batch.pixels)
    features = model.model.multi_modal_projector(hidden[-2][:, 1:]).split(batch.tiles)
    if step < ALIGN_UNTIL:
        loss, accuracy = alignment_loss(model, torch.cat(features).flatten(0, 1), batch.truths)
        return loss, {"aligned": accuracy}
    loss, right = answer_loss(model, [part.flatten(0, 1) for part in features], batch.prompts, EARLY_WEIGHT)
    scores = {"gaps": float(gaps), f"{batch.world}_loss": loss.item(), f"{batch.world}_right": right}
    part, accuracy = alignment_loss(model, torch.cat(features).flatten(0, 1), batch.truths)
    loss, scores = loss + ALIGNMENT_WEIGHT * part, scores | {"aligned": accuracy}
    if step >= MATCH_FROM:
        part, share = match_loss(model, features, batch)
        loss, scores = loss + MATCH_WEIGHT * part, scores | {"matched": share}
    if trains_tower:
        part, accuracies = heads[batch.world](hidden, batch.truths)
        loss, scores = loss + 0.3 * part, scores | accuracies
    return loss, scores


def alignment_loss(model: Any, features: Tensor, lessons: Sequence[Any]) -> tuple[Tensor, float]:
    """Return a loss that aligns projected patches with rotated embeddings of the words they show, and its accuracy.

    A patch shows a word of each head in `WORD_IDS`: name or shape, color, and the tokens of digits. The loss classifies
    the word by cosine similarity.

    Args:
        model: The model.
        features: Projected patches of all tiles, `[tiles * tokens, dim]`.
        lessons: Ground truth of the images, all of one world.
    """
    tokens, table = F.normalize(features, dim=1), model.get_input_embeddings().weight
    rotation = make_rotation(table.shape[1])
    loss, correct = features.new_zeros(()), []
    for name, ids in ((name, ids) for name, ids in WORD_IDS.items() if name in lessons[0].dense):
        target = torch.from_numpy(np.concatenate([lesson.dense[name] for lesson in lessons])).flatten()
        shows_word = (target != IGNORE) & (target < len(ids))
        logits = 20 * tokens[shows_word] @ (F.normalize(table[ids], dim=1) @ rotation.T).T
        loss = loss + F.cross_entropy(logits, target[shows_word])
        correct.append((logits.argmax(1) == target[shows_word]).float().mean().item())
    return loss, sum(correct) / len(correct)


def match_loss(model: Any, features: Sequence[Tensor], batch: Batch) -> tuple[Tensor, float]:
    """Return a loss that lets words attend to the patches that show them in the first layer, and the attended share.

    Only the first heads of the layer and the dimensions with the lowest rotary frequencies are trained.

    Args:
        model: The model.
        features: Projected patches of each image, `[tiles, tokens, dim]`.
        batch: The images.

    Returns:
        The loss, and the mean share of the attention that a word pays to its patches.
    """
    language_model = model.model.language_model
    layer, table = language_model.layers[0], model.get_input_embeddings().weight
    half, width = HEAD_DIM // 2, HEAD_DIM // 4
    slow = torch.cat([torch.arange(half - width, half), torch.arange(HEAD_DIM - width, HEAD_DIM)])

    def project(linear: nn.Module, hidden: Tensor) -> Tensor:
        heads = linear(layer.input_layernorm(hidden)).unflatten(-1, (-1, HEAD_DIM))
        return heads[:, :MATCH_HEADS, slow].transpose(0, 1)

    loss, shares = table.new_zeros(()), []
    for part, truth in zip(features, batch.truths, strict=True):
        keys = project(layer.self_attn.k_proj, part.flatten(0, 1))
        ids, masks = [], []
        for name, words in ((name, words) for name, words in WORD_IDS.items() if name in truth.dense):
            labels = torch.from_numpy(np.asarray(truth.dense[name])).flatten()
            shown = torch.unique(labels[(labels >= 0) & (labels < len(words))])
            ids += [words[number] for number in shown.tolist()]
            masks.append(labels == shown[:, None])
        queries, shows = project(layer.self_attn.q_proj, table[ids]), torch.cat(masks)
        logits = queries @ keys.transpose(1, 2) / HEAD_DIM**0.5
        share = logits.logsumexp(-1) - logits.masked_fill(~shows, -torch.inf).logsumexp(-1)
        loss = loss + share.mean() / len(features)
        shares.append((-share).exp().mean().item())
    return loss, sum(shares) / len(shares)


def draw_boards(
    rng: np.random.Generator,
    indices: Iterable[int],
    sub_images: int,
    tokenize: Callable[[str], list[int]],
    *,
    gaps: bool,
    weights: Mapping[str, float],
) -> Batch:
    """Return a batch of boards with at most four sub-images.

    The weights are the probabilities of question types, up to a common factor; 1 if absent.
    """
    grids = [grid for grid in BOARD_GRIDS if grid[0] * grid[1] == min(sub_images, 4)]
    boards = [make_board(index, "train", grid=grids[index % len(grids)]) for index in indices]
    truths = [make_lesson(board) for board in boards]
    prompts = [
        make_prompt(board, truth, rng, tokenize, gaps=gaps, weights=weights)
        for board, truth in zip(boards, truths, strict=True)
    ]
    return Batch("boards", *make_tiles(boards), truths, prompts)


def draw_pages(
    rng: np.random.Generator,
    indices: Iterable[int],
    sub_images: int,
    tokenize: Callable[[str], list[int]],
    *,
    gaps: bool,
    sparse: bool,
    weights: Mapping[str, float],
    separate_digits: bool = False,
) -> Batch:
    """Return a batch of pages with a number of sub-images.

    If it is sparse, the visual tokens are the patches of items and a few random patches. The weights are the
    probabilities of question types, up to a common factor.
    """
    grids = [grid for grid in GRIDS if grid[0] * grid[1] == sub_images]
    pages = [make_page(index, "train", grid=grids[index % len(grids)], per_type=MAX_PER_TYPE) for index in indices]
    truths = [make_page_lesson(page, separate_digits=separate_digits) for page in pages]
    prompts = []
    for page, truth in zip(pages, truths, strict=True):
        kept = draw_kept(rng, truth.item_masks, gaps=gaps)
        if sparse:
            kept = truth.item_masks.any(0) | (rng.random(kept.shape) < BACKGROUND_RATE)
        candidates = [question for question in page.questions if is_page_answerable(question, truth, kept)]
        if not candidates:  # all evidence is removed
            kept, candidates = np.ones_like(kept), list(page.questions)
        packing, n_of_type = pack_positions(page), Counter(question.type for question in candidates)
        chances = [weights[question.type] / n_of_type[question.type] for question in candidates]
        prompts.append(assemble_prompt(packing, kept, candidates, chances, rng, tokenize, gaps=gaps, limit=QUESTIONS))
    return Batch("pages", *make_tiles(pages), truths, prompts)


def train_pages(
    out: Path,
    *,
    start: Path,
    seed: int = 0,
    tower_steps: int = TOWER_STEPS,
    reader_steps: int = READER_STEPS,
    resume: bool = False,
    stop_after: int | None = None,
) -> None:
    """Train the model and export ``out/checkpoint``.

    Args:
        out: Folder of the state, the log and the checkpoint.
        start: Folder of the checkpoint to start from.
        seed: Seed of the data.
        tower_steps: Number of steps of stage 1.
        reader_steps: Number of steps of stage 2.
        resume: Whether to resume from the state in ``out``.
        stop_after: Number of steps of both stages after which to stop; the run can be resumed later.
    """
    torch.manual_seed(seed)
    model = load_start(start)
    vision = model.config.vision_config
    sizes = vision.hidden_size, vision.num_hidden_layers
    heads = nn.ModuleDict({"pages": PageHeads(*sizes), "boards": Heads(*sizes)})
    tokenize = make_cached_tokenizer(TOKENIZER)
    stages = (
        Stage(
            tower_steps,
            TOWER_RATES,
            lambda: make_optimizers(model, heads, reader=False),
            lambda step: tower_step(model, heads, seed, step),
        ),
        Stage(
            reader_steps,
            READER_RATES,
            lambda: make_optimizers(model, heads, reader=True),
            lambda step: reader_step(model, heads, tokenize, seed, step),
        ),
    )
    run_stages(out, model, heads, stages, resume=resume, stop_after=stop_after)


def main() -> None:
    """Parse the command line and train the model."""
    parser = argparse.ArgumentParser(description="Train one model for boards and pages from the shipped weights.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state, the log and the checkpoint")
    parser.add_argument("--start", type=Path, default=mini.path(), help="folder of the checkpoint to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS, help="number of steps of stage 1")
    parser.add_argument("--reader-steps", type=int, default=READER_STEPS, help="number of steps of stage 2")
    parser.add_argument("--resume", action="store_true", help="resume from the state in --out")
    parser.add_argument("--stop-after", type=int, help="total number of steps after which to stop; use --resume later")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_pages(
        options.out,
        start=options.start,
        seed=options.seed,
        tower_steps=options.tower_steps,
        reader_steps=options.reader_steps,
        resume=options.resume,
        stop_after=options.stop_after,
    )


if __name__ == "__main__":
    main()
