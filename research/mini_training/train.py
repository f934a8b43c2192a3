"""Trains the miniature model from random weights: ``python -m research.mini_training.train --out FOLDER``.

Stage 1 trains the vision tower. Heads on the CLS token after every layer classify the content of a tile, and heads on
every patch of the feature layer classify the content of the patch. As in CLIP's pre-training, this makes the CLS
attention informative; no loss applies to the attention itself. The heads are discarded. Stage 2 trains the projector
and the LLM to answer questions. The tower is frozen at first and trained again at the end.

In most steps of stage 2 a part of the visual tokens is removed, so that the LLM learns to answer with missing tokens.
The removed tokens are random: single tokens, one rate per tile, blocks, complete tiles, or items and background with
separate rates. They never depend on a strategy, attention or a score. A question is used only if the tokens that show
its answer remain. The tower is trained only on complete images, so it does not adapt to missing tokens.

Data, subsets and order depend only on the seed and the step number. A resumed run therefore gives the same result as an
uninterrupted run: bit-identical with one thread, and up to rounding with several threads.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration

from research.mini_training.build import export, make_config
from research.mini_training.lessons import (
    DENSE,
    IGNORE,
    PLACES,
    PRESENCE,
    Lesson,
    make_lesson,
    make_tiles,
)
from research.mini_training.prompts import START, TOKENIZER, Prompt, make_cached_tokenizer, make_prompt
from tokenprune.models.mini.boards import GRIDS, make_board

IMAGES = 16
"""Number of images per step."""
TOWER_STEPS = 1100
READER_STEPS = 2320
CROWDED_UNTIL = 500
"""Before this step of stage 1, three of four steps use crowded boards, which have more items per image."""
SMALL_UNTIL = 250
"""Before this step of stage 2, only boards of two tiles are used, which have shorter sequences."""
FULL_UNTIL = 250
"""Before this step of stage 2, no token is removed."""
TOGETHER_FROM = 900
"""From this step of stage 2, the tower is trained in steps without removed tokens."""
HARD_FROM = 1000
"""From this step of stage 2, fewer steps remove tokens, and hard questions are more frequent."""
PLACES_UNTIL = 1300
"""Before this step of stage 2, some questions refer to positions. They were not learned and are omitted afterwards."""
PLACES_FROM = 1820
"""From this step of stage 2, patches of the base tile are trained to classify the half of the image with their item,
and questions about it are used again."""
FULL_AGAIN_UNTIL = 1980
"""From PLACES_FROM until this step, no token is removed, because the tower is trained only on complete images."""
READING_PLACES = range(2100, 2160)
"""In these steps of stage 2 the tower is frozen, the learning rate is high, and most questions refer to positions."""
TOWER_RATES = ((0, 0.05), (19, 1.0), (605, 1.0), (TOWER_STEPS, 0.03))
"""Factors of the learning rate in stage 1 as (step, factor), with linear interpolation."""
READER_RATES = (
    *((0, 0.05), (19, 1.0), (699, 1.0), (700, 0.3), (1200, 0.25), (1299, 0.2236)),
    *((1300, 0.1), (1819, 0.005), (1820, 0.02), (1840, 0.25), (1979, 0.25), (1980, 0.12), (2080, 0.12)),
    *((2099, 0.1079), (2100, 0.4), (2160, 0.4), (2161, 0.1), (READER_STEPS, 0.005)),
)
"""Factors of the learning rate in stage 2. Colors and shapes are learned at the full rate, and the assignment of
numbers to items at a third of it."""


class Heads(nn.Module):
    """Classification heads of stage 1; they are not part of the model."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, sum(DENSE.values()))
        n_presence = sum(PRESENCE.values())
        self.cls = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_presence)) for _ in range(layers)
        )
        self.places = nn.Linear(width, sum(PLACES.values()))
        self.weights = [0.3] * (layers - 2) + [1.0] * 2

    def forward(
        self, hidden: Sequence[Tensor], lessons: Sequence[Lesson], *, places: bool = False
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of the tower and the accuracy of each head.

        Args:
            hidden: CLS and patch tokens after the embeddings and after each layer, `[tiles, 1 + tokens, width]` each.
            lessons: The ground truth of the boards that the tiles belong to.
            places: Whether to train the heads on the half of the image with the item of a patch.

        Returns:
            The loss, and the accuracy by head.
        """
        loss, scores = hidden[0].new_zeros(()), {}
        parts = self.dense(hidden[-2][:, 1:]).flatten(0, 1).split(list(DENSE.values()), dim=1)
        for name, logits in zip(DENSE, parts, strict=True):
            target = torch.from_numpy(np.concatenate([lesson.dense[name] for lesson in lessons])).flatten()
            has_empty_class = name in ("shape", "color", "tens", "units")
            weight = torch.ones(logits.shape[1])
            if has_empty_class:  # Most patches are empty; without a weight, this class would dominate.
                weight[-1] = 0.1
            part = F.cross_entropy(logits, target, weight=weight, ignore_index=IGNORE)
            loss = loss + (1.0 if has_empty_class else 0.15) * part
            is_scored = (target != IGNORE) & ((target != logits.shape[1] - 1) if has_empty_class else True)
            scores[name] = (logits.argmax(1) == target)[is_scored].float().mean().item()
        if places:
            halves = self.places(hidden[-2][:, 1:]).flatten(0, 1).split(list(PLACES.values()), dim=1)
            weight = torch.tensor([2.0, 2.0, 0.5])
            for name, logits in zip(PLACES, halves, strict=True):
                target = torch.from_numpy(np.concatenate([lesson.places[name] for lesson in lessons])).flatten()
                loss = loss + 2.0 * F.cross_entropy(logits, target, weight=weight, ignore_index=IGNORE)
                is_scored = (target == 0) | (target == 1)
                scores[name] = (logits.argmax(1) == target)[is_scored].float().mean().item()
        target = torch.from_numpy(
            np.concatenate([np.concatenate([lesson.presence[name] for name in PRESENCE], axis=1) for lesson in lessons])
        ).float()
        readable = torch.ones_like(target)
        is_base = torch.cat([torch.arange(len(lesson.dense["paper"])) == 0 for lesson in lessons])
        readable[is_base, PRESENCE["pair"] :] = 0
        for weight_of_layer, head, layer in zip(self.weights, self.cls, hidden[1:], strict=True):
            logits = head(layer[:, 0])
            part = F.binary_cross_entropy_with_logits(logits, target, weight=readable, reduction="sum")
            loss = loss + weight_of_layer * 8 * part / readable.sum()
        is_correct = (logits > 0) == (target > 0)
        scores["cls"] = is_correct[(target > 0) & (readable > 0)].float().mean().item()
        return loss, scores


def tower_output(model: Any, pixels: Tensor) -> tuple[Tensor, ...]:
    """Return CLS and patch tokens after the embeddings and after each layer, `[tiles, 1 + tokens, width]` each."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states


_PLACES = {"side": 6.0, "height": 6.0}
_HARD = {"color": 0.4, "shape": 0.4, "paper": 0.4, "number_color": 2.0, "side": 2.5, "height": 2.5, "order": 2.5}


def answer_loss(
    model: Any, features: Sequence[Tensor], prompts: Sequence[Prompt], early_weight: float = 0.0
) -> tuple[Tensor, float]:
    """Return the loss on the answers, and the share of questions with a correct answer in every token.

    Args:
        model: The model.
        features: Projected tokens of each image, `[tiles * tokens, dim]` each.
        prompts: Training sequence of each image.
        early_weight: Weight of the loss on the early labels. They train a lookup at the word that it depends on, which
            is learned faster than a lookup after a copy of the word.

    Returns:
        The loss and the share of correct answers.
    """
    width = max(len(START) + len(prompt.token_indices) + len(prompt.ids) for prompt in prompts)
    shape = len(prompts), width
    positions, groups = np.zeros(shape, dtype=np.int64), np.full(shape, -2)
    labels, early_labels = np.full(shape, IGNORE), np.full(shape, IGNORE)
    ids, table_rows = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    visual = np.zeros(shape, dtype=bool)
    first = 1
    for row, (feature, prompt) in enumerate(zip(features, prompts, strict=True)):
        begin = len(START)
        middle, end = begin + len(prompt.token_indices), begin + len(prompt.token_indices) + len(prompt.ids)
        ids[row, :begin], ids[row, middle:end] = START, prompt.ids
        positions[row, :begin] = np.arange(begin)
        positions[row, begin:middle], positions[row, middle:end] = prompt.positions, prompt.text_positions
        groups[row, :middle], groups[row, middle:end] = -1, prompt.block
        labels[row, middle:end], early_labels[row, middle:end] = prompt.labels, prompt.early_labels
        # Row 0 of the table below is the newline token.
        table_rows[row, begin:middle] = np.where(prompt.token_indices >= 0, prompt.token_indices + first, 0)
        visual[row, begin:middle] = True
        first += len(feature)
    table = torch.cat([model.model.image_newline[None], *features])
    is_visual = torch.from_numpy(visual)
    embeds = model.get_input_embeddings()(torch.from_numpy(ids)).masked_scatter(
        is_visual[..., None], table[torch.from_numpy(table_rows)[is_visual]]
    )
    group = torch.from_numpy(groups)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    can_attend = (group[:, None, :] == -1) | (group[:, None, :] == group[:, :, None])
    mask = (can_attend & causal)[:, None]
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=torch.from_numpy(positions),
        use_cache=False,
    ).last_hidden_state
    target = torch.from_numpy(labels)
    has_label = target != IGNORE
    logits = model.lm_head(hidden[has_label])
    loss = F.cross_entropy(logits, target[has_label])
    if early_weight:
        early = torch.from_numpy(early_labels)
        is_early = early != IGNORE
        loss = loss + early_weight * F.cross_entropy(model.lm_head(hidden[is_early]), early[is_early])
    wrong = (logits.argmax(1) != target[has_label]).float()
    limit = int(groups.max()) + 1
    question = (torch.arange(shape[0])[:, None] * limit + group)[has_label]
    count = torch.zeros(shape[0] * limit).index_add_(0, question, torch.ones(len(question)))
    failed = torch.zeros(shape[0] * limit).index_add_(0, question, wrong)
    return loss, (failed[count > 0] == 0).float().mean().item()


def split_parameters(
    model: nn.Module, is_trained: Callable[[str], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices in layers and projector, and all other parameters.

    Args:
        model: The model.
        is_trained: Returns whether the parameter of a name is trained; others are left out.
    """
    matrices: list[nn.Parameter] = []
    remaining: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if is_trained(name):
            is_matrix = parameter.ndim == 2 and ("layers" in name or "projector" in name)
            (matrices if is_matrix else remaining).append(parameter)
    return matrices, remaining


def make_optimizers(model: Any, heads: nn.Module, *, reader: bool) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices in layers and projector, and AdamW for all other parameters.

    Args:
        model: The model.
        heads: The heads of stage 1.
        reader: Whether projector and LLM are also trained.

    Returns:
        The two optimizers.
    """
    matrices, remaining = split_parameters(model, lambda name: reader or "vision_tower" in name)
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW([*heads.parameters(), *remaining], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rates(opts: Sequence[torch.optim.Optimizer], step: int, rates: Sequence[tuple[int, float]]) -> None:
    """Set the learning rates of a step.

    Args:
        opts: The optimizers.
        step: The step.
        rates: Knots as (step, factor), with linear interpolation.
    """
    factor = float(np.interp(step, [knot for knot, _ in rates], [value for _, value in rates]))
    for opt in opts:
        for group in opt.param_groups:
            group.setdefault("full_rate", group["lr"])
            group["lr"] = group["full_rate"] * factor


def tower_step(model: Any, heads: Heads, seed: int, step: int) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step of stage 1."""
    crowded = step < CROWDED_UNTIL and step % 4 > 0
    start = 100_000_000 * seed + IMAGES * step
    boards = [make_board(start + k, "train", crowded=crowded) for k in range(IMAGES)]
    loss, scores = heads(tower_output(model, make_tiles(boards)[0]), [make_lesson(board) for board in boards])
    return loss, scores


def reader_step(
    model: Any, heads: Heads, tokenize: Callable[[str], list[int]], seed: int, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step of stage 2."""
    rng = np.random.default_rng((seed, 2, step))
    start = 100_000_000 * seed + 50_000_000 + IMAGES * step
    if step < HARD_FROM:
        gaps = step >= FULL_UNTIL and step % 5 > 1
    else:
        gaps = (step + step // 6) % 3 > 1 if step < PLACES_UNTIL else (step + step // 6) % 2 > 0
        gaps &= not PLACES_FROM <= step < FULL_AGAIN_UNTIL
    # All boards of a step have the same number of tiles, so that their sequences have similar lengths.
    grids = [grid for grid in GRIDS if grid[0] * grid[1] == (2 if step < SMALL_UNTIL else (2, 4, 3, 4, 2, 4)[step % 6])]
    orders, with_places = step < PLACES_UNTIL, step >= PLACES_FROM
    boards = [
        make_board(start + k, "train", grid=grids[k % len(grids)], places=orders or with_places, orders=orders)
        for k in range(IMAGES)
    ]
    truths = [make_lesson(board) for board in boards]
    pixels, tiles = make_tiles(boards)
    trains_tower = not gaps and step >= TOGETHER_FROM and step not in READING_PLACES
    with torch.set_grad_enabled(trains_tower):
        hidden = tower_output(model, pixels)
    features = model.model.multi_modal_projector(hidden[-2][:, 1:]).split(tiles)
    weights = {} if step < HARD_FROM else _HARD if step < READING_PLACES.start else _PLACES
    prompts = [
        make_prompt(board, truth, rng, tokenize, gaps=gaps, weights=weights)
        for board, truth in zip(boards, truths, strict=True)
    ]
    loss, right = answer_loss(model, [part.flatten(0, 1) for part in features], prompts)
    scores = {"gaps": float(gaps), "answers": loss.item(), "right": right}
    if trains_tower:
        tower_loss, accuracies = heads(hidden, truths, places=with_places)
        loss, scores = loss + (1.0 if with_places else 0.3) * tower_loss, scores | accuracies
    return loss, scores


def train(
    out: Path,
    *,
    seed: int = 0,
    tower_steps: int = TOWER_STEPS,
    reader_steps: int = READER_STEPS,
    resume: bool = False,
    stop_after: int | None = None,
) -> None:
    """Train the model and export ``out/checkpoint``.

    Args:
        out: Folder of the state, the log and the checkpoint.
        seed: Seed of weights and data.
        tower_steps: Number of steps of stage 1.
        reader_steps: Number of steps of stage 2.
        resume: Whether to resume from the state in ``out``.
        stop_after: Number of steps of both stages after which to stop; the run can be resumed later.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model: Any = LlavaNextForConditionalGeneration(make_config(TOKENIZER))
    vision = model.config.vision_config
    heads = Heads(vision.hidden_size, vision.num_hidden_layers)
    tokenize = make_cached_tokenizer()
    done, spent, opts = 0, 0.0, make_optimizers(model, heads, reader=False)
    if resume:
        state = torch.load(out / "state.pt", weights_only=True)
        done, spent = state["done"], state["seconds"]
        if done >= tower_steps:
            opts = make_optimizers(model, heads, reader=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        if done not in (tower_steps, tower_steps + PLACES_FROM):
            for opt, saved in zip(opts, state["optimisers"], strict=True):
                opt.load_state_dict(saved)
    since = time.monotonic() - spent
    model.train()
    while done < min(tower_steps + reader_steps, stop_after or tower_steps + reader_steps):
        if done in (tower_steps, tower_steps + PLACES_FROM):
            opts = make_optimizers(model, heads, reader=True)
        if done < tower_steps:
            set_rates(opts, done, TOWER_RATES)
            loss, scores = tower_step(model, heads, seed, done)
        else:
            set_rates(opts, done - tower_steps, READER_RATES)
            loss, scores = reader_step(model, heads, tokenize, seed, done - tower_steps)
        loss.backward()
        trained = [parameter for opt in opts for group in opt.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        done += 1
        entry = {"step": done, "seconds": time.monotonic() - since, "loss": loss.item(), **scores}
        line = json.dumps({name: round(value, 4) for name, value in entry.items()})
        with (out / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        if done % 20 == 0:
            print(line, flush=True)
        if done % 100 == 0 or done in (tower_steps, tower_steps + reader_steps, stop_after):
            state = {"model": model.state_dict(), "heads": heads.state_dict(), "done": done}
            state |= {"seconds": time.monotonic() - since, "optimisers": [opt.state_dict() for opt in opts]}
            torch.save(state, out / "state.new")
            (out / "state.new").rename(out / "state.pt")
            export(model, out / "checkpoint")


def main() -> None:
    """Parse the command line and train the model."""
    parser = argparse.ArgumentParser(description="Train the miniature model from random weights.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state, the log and the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS, help="number of steps of stage 1")
    parser.add_argument("--reader-steps", type=int, default=READER_STEPS, help="number of steps of stage 2")
    parser.add_argument("--resume", action="store_true", help="resume from the state in --out")
    parser.add_argument("--stop-after", type=int, help="total number of steps after which to stop; use --resume later")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(
        options.out,
        seed=options.seed,
        tower_steps=options.tower_steps,
        reader_steps=options.reader_steps,
        resume=options.resume,
        stop_after=options.stop_after,
    )


if __name__ == "__main__":
    main()
