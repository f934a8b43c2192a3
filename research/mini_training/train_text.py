"""Trains the text tower of the miniature model: ``python -m research.mini_training.train_text --out FOLDER``.

The result is a `transformers.CLIPModel` with the vision tower of the checkpoint, for methods that compare the question
with the patches. Training uses CLIP's contrastive loss on tiles of training boards and sentences about the content of a
tile. The vision tower is frozen, so its outputs are computed once. The text tower, both projections, the last LayerNorm
of the vision tower (which the vision-language model does not use) and the temperature are trained.

CLIP compares only the CLS token, so its patch features are not aligned with texts. Here a second contrastive loss
trains the patches of the feature layer. It pools the patches by their similarity to a sentence, as in patch-aligned
contrastive learning (arXiv 2212.04994). This training does not use the position of an item in a tile; the training of
the vision tower does, see `research.mini_training.train`.

A sentence often matches several tiles. The loss therefore uses the ground truth and counts all tiles that show the
content of a sentence as matches (contrastive learning in image, text and label space, arXiv 2204.03610).
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPModel,
)

from research.mini_training.captions import ILLEGIBLE, NOTHING, Integers, draw_caption, match_captions
from research.mini_training.evaluate_text import measure_auc
from research.mini_training.lessons import make_lesson, make_tiles
from research.mini_training.page_captions import describe_page_tiles, draw_page_caption
from research.mini_training.text_model import (
    embed_features,
    embed_texts,
    export_text,
    make_text_model,
    make_text_tokenizer,
)
from tokenprune.models import mini
from tokenprune.models.mini.boards import Board, Split, make_board
from tokenprune.models.mini.pages import list_words, make_page
from tokenprune.strategies.components.relevance import SIGNS

Sign: TypeAlias = Literal["opposite", "aligned"]
BOARDS = 3000
"""Number of training boards. Each board is used several times, and its tower outputs are computed once."""
STEPS = 1000
BATCH = 128
"""Number of tiles per step, with one sentence per tile."""
RATE = 2e-3


@dataclass(frozen=True)
class Cache:
    """Outputs of the frozen vision tower and ground-truth content of tiles.

    Attributes:
        cls: CLS tokens after the last layer, `[tiles, width]`.
        patches: Patch tokens after the feature layer in half precision, `[tiles, tokens, width]`.
        contents: Class of item (1), shape, color, tens, units and paper, with one row per item of a tile. The first row
            of a tile describes its paper, and unused rows repeat it, `[tiles, 1 + items, 6]`. On pages, names are
            further shapes, and there is no paper.
    """

    cls: Tensor
    patches: Tensor
    contents: Integers


def describe_board_tiles(board: Board) -> Integers:
    """Return the content of the tiles of a board, see `Cache`, `[tiles, 1 + 4, 6]`."""
    truth = make_lesson(board)
    tiles = 1 + board.grid[0] * board.grid[1]
    empty = [0, NOTHING, NOTHING, NOTHING, NOTHING, board.paper]
    contents = np.full((tiles, 5, 6), empty, np.int64)
    for number, item in enumerate(board.items):
        for tile in np.flatnonzero(truth.item_masks[number].any(-1)):
            digits = divmod(item.number, 10) if tile else (ILLEGIBLE, ILLEGIBLE)
            contents[tile, 1 + number] = [1, item.shape, item.color, *digits, board.paper]
    return contents


@torch.no_grad()
def read_boards(model: Any, count: int, split: Split = "train", start: int = 0) -> Cache:
    """Run boards through the frozen vision tower.

    Args:
        model: The CLIP model.
        count: Number of boards.
        split: Split of the boards.
        start: Index of the first board.

    Returns:
        Outputs of the tower and contents of all tiles.
    """
    return _read_images(model, partial(make_board, split=split), describe_board_tiles, range(start, start + count))


@torch.no_grad()
def read_pages(model: Any, count: int, split: Split = "train", start: int = 0) -> Cache:
    """Run pages through the frozen vision tower, see `read_boards`."""
    return _read_images(model, partial(make_page, split=split), describe_page_tiles, range(start, start + count))


def _read_images(
    model: Any, make: Callable[[int], Any], describe: Callable[[Any], Integers], indices: Sequence[int]
) -> Cache:
    """Return the outputs of the tower for images, 16 at a time, and the contents of their tiles."""
    cls, patches, contents = [], [], []
    for first in range(0, len(indices), 16):
        batch = [make(index) for index in indices[first : first + 16]]
        hidden = model.vision_model(make_tiles(batch)[0], output_hidden_states=True).hidden_states
        cls.append(hidden[-1][:, 0].clone())
        patches.append(hidden[-2][:, 1:].half())
        contents += [describe(image) for image in batch]
    return Cache(torch.cat(cls), torch.cat(patches), np.concatenate(contents))


def join_caches(first: Cache, second: Cache) -> Cache:
    """Return the tiles of two caches; the contents with fewer rows repeat their first row."""
    rows = max(first.contents.shape[1], second.contents.shape[1])

    def pad(contents: Integers) -> Integers:
        return np.concatenate([contents, contents[:, :1].repeat(rows - contents.shape[1], axis=1)], axis=1)

    cls, patches = torch.cat([first.cls, second.cls]), torch.cat([first.patches, second.patches])
    return Cache(cls, patches, np.concatenate([pad(first.contents), pad(second.contents)]))


def contrastive_loss(logits: Tensor, match: Tensor, is_determined: Tensor) -> Tensor:
    """Return the contrastive loss with several matches per row and column, averaged over rows and columns.

    Args:
        logits: Scaled similarity of sentences and tiles, `[captions, tiles]`.
        match: Whether a sentence matches a tile, bool `[captions, tiles]`.
        is_determined: Pairs to include in the loss, bool `[captions, tiles]`.

    Returns:
        The loss.
    """
    logits = logits.masked_fill(~is_determined, -1e4)
    loss = logits.new_zeros(())
    for dim in (0, 1):
        count = match.sum(dim)
        part = -(F.log_softmax(logits, dim) * match).sum(dim) / count.clamp(min=1)
        loss = loss + part[count > 0].mean() / 2
    return loss


def text_step(
    model: Any, tokenizer: Any, cache: Cache, seed: int, step: int, patches: float, sign: Sign = "aligned"
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step.

    Args:
        model: The CLIP model.
        tokenizer: The tokenizer of the text tower.
        cache: The tiles.
        seed: Seed of the random tiles and sentences.
        step: Index of the step.
        patches: Weight of the loss on patches.
        sign: Sign of the cosine of a patch and a sentence that it shows, see `TextRelevance`.

    Returns:
        The loss and the scores.
    """
    rng = np.random.default_rng((seed, 3, step))
    indices = rng.choice(len(cache.contents), size=min(BATCH, len(cache.contents)), replace=False)
    contents = cache.contents[indices]
    captions = [(draw_page_caption if rows[0, 5] == NOTHING else draw_caption)(rng, rows) for rows in contents]
    match, is_determined = match_captions(captions, contents)
    texts = embed_texts(model, tokenizer, [caption.text for caption in captions])
    scale = model.logit_scale.exp()
    similarity = texts @ embed_features(model, cache.cls[indices]).T
    loss = contrastive_loss(scale * similarity, match, is_determined)
    best = similarity.masked_fill(~is_determined, -2).argmax(1, keepdim=True)
    scores = {"cls": loss.item(), "found": match.gather(1, best).float().mean().item()}
    if patches:
        local = embed_features(model, cache.patches[indices].float())
        by_patch = SIGNS[sign] * torch.einsum("cd,tpd->ctp", texts, local)
        # The most similar patches represent the tile, because the position of an item is not used.
        pooled = (by_patch * (10 * by_patch).softmax(-1)).sum(-1)
        part = contrastive_loss(scale * pooled, match, is_determined)
        loss = loss + patches * part
        scores["patches"] = part.item()
    return loss, scores


def train_text(
    out: Path,
    *,
    checkpoint: Path | None = None,
    seed: int = 0,
    steps: int = STEPS,
    boards: int = BOARDS,
    pages: int = 0,
    patches: float = 1.0,
    sign: Sign = "aligned",
) -> CLIPModel:
    """Train the text tower and export ``out/text``.

    Args:
        out: Folder of the log and the result.
        checkpoint: Folder of the model with the vision tower; by default the shipped checkpoint.
        seed: Seed of weights and data.
        steps: Number of training steps.
        boards: Number of training boards.
        pages: Number of training pages. If there are pages, the model knows their words, see `train_pages`.
        patches: Weight of the loss on patches; 0 trains only the CLS token, as in CLIP.
        sign: ``"opposite"`` trains patches to have a lower cosine with the sentences that they show, as in OpenAI's
            CLIP; ``"aligned"`` a higher cosine.

    Returns:
        The trained model.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    since = time.monotonic()
    more_words = list_words() if pages else ()
    vlm: Any = AutoModelForImageTextToText.from_pretrained(checkpoint or mini.path(), dtype=torch.float32)
    model: Any = make_text_model(vlm.model.vision_tower, more_words).eval()
    tokenizer = make_text_tokenizer(more_words)
    start = 200_000_000 + 1_000_000 * seed
    cache = read_boards(model, boards, "train", start)
    if pages:
        cache = join_caches(cache, read_pages(model, pages, "train", start))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": 0.05},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    print(f"{len(cache.contents)} tiles read after {time.monotonic() - since:.0f} s", flush=True)
    with (out / "text.jsonl").open("w") as log:
        for step in range(steps):
            factor = min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in opt.param_groups:
                group["lr"] = RATE * factor
            loss, scores = text_step(model, tokenizer, cache, seed, step, patches, sign)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            entry = {"step": step + 1, "seconds": time.monotonic() - since, **scores}
            line = json.dumps({name: round(value, 4) for name, value in entry.items()})
            log.write(line + "\n")
            if (step + 1) % 100 == 0:
                print(line, flush=True)
    export_text(model, out / "text", more_words)
    clip: CLIPModel = CLIPModel.from_pretrained(out / "text").eval()
    AutoTokenizer.from_pretrained(out / "text")
    return clip


def main() -> None:
    """Parse the command line, train the text tower and print the results of `measure_auc` on held-out boards."""
    parser = argparse.ArgumentParser(description="Train the text tower of the miniature model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the log and the result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--boards", type=int, default=BOARDS, help="number of training boards")
    parser.add_argument("--pages", type=int, default=0, help="number of training pages")
    parser.add_argument("--checkpoint", type=Path, default=mini.path(), help="folder of the model")
    parser.add_argument(
        "--sign", choices=SIGNS, default="aligned", help="sign of patches, opposite as in OpenAI's CLIP"
    )
    parser.add_argument("--patches", type=float, default=1.0, help="weight of the loss on patches, 0 as in CLIP")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = train_text(
        options.out,
        checkpoint=options.checkpoint,
        seed=options.seed,
        steps=options.steps,
        boards=options.boards,
        pages=options.pages,
        patches=options.patches,
        sign=options.sign,
    )
    tokenizer = make_text_tokenizer(list_words() if options.pages else ())
    for world in ("boards", "pages") if options.pages else ("boards",):
        for name, (value, number) in measure_auc(model, tokenizer, world=world).items():
            print(json.dumps({"world": world, "what": name, "value": round(value, 3), "questions": number}))


if __name__ == "__main__":
    main()
