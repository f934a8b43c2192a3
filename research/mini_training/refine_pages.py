"""Refines the model of boards and pages: ``python -m research.mini_training.refine_pages``.

In a tower of `train_pages`, each patch of a number shows both digits, so that one kept patch of an item answers every
question about its number. Here a new tower is trained, whose patches are trained to show their own digit only. A number
then requires two tokens, and strategies differ at larger budgets. (A tower of `train_pages` does not forget the other
digit: after 900 steps on the same labels, a linear probe still read it from every patch.)

Stage 1 trains the tower, which starts from the shipped tower for boards. Stage 2 trains the projector with the loss of
`train_pages.alignment_loss`, so that patches of the new tower are aligned with the words that they show. Stage 3 trains
projector and LLM behind the frozen tower.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from research.mini_training.muon import Muon
from research.mini_training.prompts import make_cached_tokenizer
from research.mini_training.stages import Stage, run_stages
from research.mini_training.train import Heads, answer_loss, split_parameters, tower_output
from research.mini_training.train_pages import (
    ALIGNMENT_WEIGHT,
    EARLY_WEIGHT,
    IMAGES,
    MATCH_WEIGHT,
    TOKENIZER,
    Batch,
    PageHeads,
    alignment_loss,
    draw_boards,
    draw_pages,
    match_loss,
    tower_loss,
)
from tokenprune.models import mini
from tokenprune.models.mini.boards import make_board
from tokenprune.models.mini.pages import make_page

PAGES, BOARDS = 6, 8
"""Number of pages and boards in a step of stage 1."""
TOWER_STEPS = 1800
PROJECTOR_STEPS = 150
READER_STEPS = 4511
TOWER_RATES = (
    *((0, 0.025), (20, 0.5), (600, 0.5), (999, 0.01)),
    *((1000, 0.025), (1020, 0.4), (1400, 0.4), (TOWER_STEPS, 0.005)),
)
"""Factors of the learning rate in stage 1 as (step, factor), with linear interpolation. For the stored weights, the
optimizers started anew at step 1000."""
PROJECTOR_RATES = ((0, 0.05), (20, 0.5), (PROJECTOR_STEPS, 0.1))
"""Factors of the learning rate in stage 2."""
READER_RATES = (
    *((0, 0.02), (20, 0.3), (838, 0.3), (839, 0.4), (1560, 0.4), (1561, 0.3), (3061, 0.002)),
    *((3062, 0.01), (3080, 0.25), (3961, 0.002)),
    *((3962, 0.01), (3980, 0.22), (READER_STEPS, 0.002)),
)
"""Factors of the learning rate in stage 3."""
BOARD_WEIGHT = 1.0
"""Weight of the loss on boards in stage 1."""
PLACE_WEIGHT = 2.0
"""Weight of the heads on places and counts in stage 1."""
GAPS_EVERY = 4
"""One in this many steps of stage 3 removes tokens."""
PAGE_WEIGHTS = {
    **dict.fromkeys(("name", "count"), 8.0),
    **dict.fromkeys(("compare", "color_value"), 3.0),
    **dict.fromkeys(("largest", "smallest"), 2.0),
    **dict.fromkeys(("side", "height"), 1.0),
    "value": 5.0,
}
"""Weights of types of questions about pages in stage 3."""
LATE_FROM = 839
"""From this step of stage 3 on, weak types of questions about pages get more weight."""
LATE_PAGE_WEIGHTS = {**PAGE_WEIGHTS, "name": 14.0, "color_value": 6.0, "count": 6.0, "value": 3.0}
LAST_FROM = 3961
"""From this step of stage 3 on, the types of questions that are still weak get more weight."""
LAST_PAGE_WEIGHTS = {**LATE_PAGE_WEIGHTS, "count": 12.0, "largest": 4.0, "smallest": 4.0}
PAGE_WEIGHTS_FROM = ((LAST_FROM, LAST_PAGE_WEIGHTS), (LATE_FROM, LATE_PAGE_WEIGHTS), (0, PAGE_WEIGHTS))
"""Weights of stage 3 by their first step, the last ones first."""
BOARD_WEIGHTS = {"count": 4.0, "number_color": 2.0, "number_shape": 2.0, "color": 0.5, "shape": 0.5, "paper": 0.5}
"""Weights of types of questions about boards in stage 3."""
_FIRST = 1_000_000_000
"""Index of the first image; `train_pages` used smaller ones."""
_STAGE = 10_000_000
"""Distance of the first images of two stages."""


def load_start(checkpoint: Path, tower: Path) -> Any:
    """Return the model of a checkpoint with the vision tower of another one, in float32."""
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    other: Any = AutoModelForImageTextToText.from_pretrained(tower, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(other.model.vision_tower.state_dict())
    return model


def refine_tower(model: Any, heads: nn.ModuleDict, step: int) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step of stage 1."""
    start = _FIRST + step * PAGES  # consecutive steps share two boards
    pages = [make_page(start + k, "train") for k in range(PAGES)]
    boards = [make_board(start + k, "train", crowded=k % 2 == 0) for k in range(BOARDS)]
    return tower_loss(model, heads, pages, boards, board_weight=BOARD_WEIGHT, separate_digits=True)


def draw_batch(tokenize: Callable[[str], list[int]], stage: int, step: int, *, gaps: bool) -> Batch:
    """Return the images and questions of one step of stage 2 or 3, with or without removed tokens."""
    rng = np.random.default_rng((stage, step))
    start = _FIRST + stage * _STAGE + IMAGES * step
    indices = range(start, start + IMAGES)
    sub_images = (4, 2, 6, 3)[step // 8 % 4]
    if step % 8 in (0, 3, 5):
        return draw_boards(rng, indices, sub_images, tokenize, gaps=gaps, weights=BOARD_WEIGHTS)
    weights = next(weights for first, weights in PAGE_WEIGHTS_FROM if step >= first)
    return draw_pages(
        rng, indices, sub_images, tokenize, gaps=gaps, sparse=False, weights=weights, separate_digits=True
    )


def project(model: Any, batch: Batch) -> list[Tensor]:
    """Return the projected patches of each image, `[tiles, tokens, dim]` each; the tower has no gradient."""
    with torch.no_grad():
        hidden = tower_output(model, batch.pixels)
    return list(model.model.multi_modal_projector(hidden[-2][:, 1:]).split(batch.tiles))


def align_projector(model: Any, tokenize: Callable[[str], list[int]], step: int) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step of stage 2."""
    batch = draw_batch(tokenize, 2, step, gaps=False)
    loss, accuracy = alignment_loss(model, torch.cat(project(model, batch)).flatten(0, 1), batch.truths)
    return loss, {"aligned": accuracy}


def refine_reader(model: Any, tokenize: Callable[[str], list[int]], step: int) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step of stage 3."""
    gaps = step % GAPS_EVERY == 0
    batch = draw_batch(tokenize, 3, step, gaps=gaps)
    features = project(model, batch)
    loss, right = answer_loss(model, [part.flatten(0, 1) for part in features], batch.prompts, EARLY_WEIGHT)
    scores = {"gaps": float(gaps), f"{batch.world}_loss": loss.item(), f"{batch.world}_right": right}
    aligned, accuracy = alignment_loss(model, torch.cat(features).flatten(0, 1), batch.truths)
    matched, share = match_loss(model, features, batch)
    loss = loss + ALIGNMENT_WEIGHT * aligned + MATCH_WEIGHT * matched
    return loss, scores | {"aligned": accuracy, "matched": share}


def make_optimizers(model: Any, heads: nn.Module, part: str) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices and AdamW for the other parameters of a part of the model.

    Args:
        model: The model.
        heads: The heads of stage 1, which are trained with the tower.
        part: ``tower``, ``projector`` or ``reader`` (projector and LLM).
    """
    is_trained = {
        "tower": lambda name: "vision_tower" in name,
        "projector": lambda name: "projector" in name,
        "reader": lambda name: "vision_tower" not in name,
    }[part]
    matrices, remaining = split_parameters(model, is_trained)
    if part == "tower":
        remaining = [*heads.parameters(), *remaining]
    return [Muon(matrices), torch.optim.AdamW(remaining, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def refine_pages(
    out: Path,
    *,
    start: Path,
    tower: Path,
    tower_steps: int = TOWER_STEPS,
    projector_steps: int = PROJECTOR_STEPS,
    reader_steps: int = READER_STEPS,
    resume: bool = False,
    stop_after: int | None = None,
) -> None:
    """Train a new tower and refine projector and LLM, and export ``out/checkpoint``.

    Args:
        out: Folder of the state, the log and the checkpoint.
        start: Folder of a checkpoint of `train_pages`.
        tower: Folder of the checkpoint whose tower is the start of the new tower.
        tower_steps: Number of steps of stage 1.
        projector_steps: Number of steps of stage 2.
        reader_steps: Number of steps of stage 3.
        resume: Whether to resume from the state in ``out``.
        stop_after: Number of steps of all stages after which to stop; the run can be resumed later.
    """
    torch.manual_seed(0)
    model = load_start(start, tower)
    vision = model.config.vision_config
    sizes = vision.hidden_size, vision.num_hidden_layers
    heads = nn.ModuleDict({"pages": PageHeads(*sizes, PLACE_WEIGHT), "boards": Heads(*sizes)})
    tokenize = make_cached_tokenizer(TOKENIZER)
    stages = (
        Stage(
            tower_steps,
            TOWER_RATES,
            lambda: make_optimizers(model, heads, "tower"),
            lambda step: refine_tower(model, heads, step),
        ),
        Stage(
            projector_steps,
            PROJECTOR_RATES,
            lambda: make_optimizers(model, heads, "projector"),
            lambda step: align_projector(model, tokenize, step),
        ),
        Stage(
            reader_steps,
            READER_RATES,
            lambda: make_optimizers(model, heads, "reader"),
            lambda step: refine_reader(model, tokenize, step),
        ),
    )
    run_stages(out, model, heads, stages, resume=resume, stop_after=stop_after)


def main() -> None:
    """Parse the command line and refine the model."""
    parser = argparse.ArgumentParser(description="Refine the model of boards and pages.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state, the log and the checkpoint")
    parser.add_argument("--start", type=Path, required=True, help="folder of a checkpoint of train_pages")
    parser.add_argument("--tower", type=Path, default=mini.path(), help="folder of the checkpoint with the first tower")
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS, help="number of steps of stage 1")
    parser.add_argument("--projector-steps", type=int, default=PROJECTOR_STEPS, help="number of steps of stage 2")
    parser.add_argument("--reader-steps", type=int, default=READER_STEPS, help="number of steps of stage 3")
    parser.add_argument("--resume", action="store_true", help="resume from the state in --out")
    parser.add_argument("--stop-after", type=int, help="total number of steps after which to stop; use --resume later")
    parser.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    refine_pages(options.pop("out"), **options)


if __name__ == "__main__":
    main()
