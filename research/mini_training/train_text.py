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
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    PreTrainedTokenizerFast,
)

from research.mini_training.build import make_tokenizer
from research.mini_training.lessons import TOKENS, make_lesson, make_tiles, pack_positions
from tokenprune.models import mini
from tokenprune.models.mini.boards import COLORS, PAPERS, SHAPES, Board, Split, make_board

__all__ = [
    "Cache",
    "Caption",
    "cls_scores",
    "draw_caption",
    "export_text",
    "make_text_model",
    "make_text_tokenizer",
    "match_captions",
    "measure_auc",
    "patch_scores",
    "read_boards",
    "train_text",
]

BOARDS = 3000
"""Number of training boards. Each board is used several times, and its tower outputs are computed once."""
STEPS = 1000
BATCH = 128
"""Number of tiles per step, with one sentence per tile."""
RATE = 2e-3
MAX_TOKENS = 32
"""Number of positions of the text tower."""
ANY, NOTHING, ILLEGIBLE = -1, -2, -3
"""`ANY` (captions): every value matches. `NOTHING` (tiles): no value. `ILLEGIBLE` (tiles): the value is too coarse to
read."""

Integers = NDArray[np.int64]
_END = "<|endoftext|>"
_ABOUT_ITEM = (
    *(("what number is on the {color} {shape}?", "sc"), ("what number is on the {shape}?", "s")),
    *(("what number is on the {color} shape?", "c"), ("what color is the {shape}?", "s")),
    *(("what shape is {color}?", "c"), ("is the {color} {shape} in the left or right half?", "sc")),
    *(("is the {color} {shape} in the top or bottom half?", "sc"), ("how many shapes are there?", "")),
    *(("{color} {shape}", "sc"), ("the {shape} is {color}", "sc"), ("this is the {color} {shape}", "sc")),
    *(("the {shape}", "s"), ("there is the {shape}", "s"), ("the {color} shape", "c"), ("it is {color}", "c")),
)
_ABOUT_NUMBER = (
    *(("number {number}", "n"), ("number {number} on the {color} {shape}", "scn")),
    *(("the number on the {shape} is {number}", "sn"), ("{number} is on the {color} shape", "cn")),
)
_ABOUT_PAPER = (("{paper} paper", "p"), ("the paper is {paper}", "p"), ("what paper is this?", ""))
_UNKNOWN = "please "
"""A word that is not in the vocabulary. Users can write unknown words, and a few of them before a sentence must not
change the result."""


@dataclass(frozen=True)
class Caption:
    """A sentence, and the classes that a tile must show to match it.

    Attributes:
        text: The sentence.
        required: Class of item, shape, color, tens, units and paper; `ANY` if the sentence does not depend on it.
    """

    text: str
    required: tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Cache:
    """Outputs of the frozen vision tower and ground-truth content of tiles.

    Attributes:
        cls: CLS tokens after the last layer, `[tiles, width]`.
        patches: Patch tokens after the feature layer in half precision, `[tiles, tokens, width]`.
        contents: Class of item (1), shape, color, tens, units and paper, with one row per item of a tile. The first row
            of a tile describes its paper, and unused rows repeat it, `[tiles, 1 + items, 6]`.
    """

    cls: Tensor
    patches: Tensor
    contents: Integers


def make_text_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of the text tower: the tokenizer of the model with an end token as in CLIP.

    The words keep their ids. The end token is new and has the highest id. `transformers` finds the end by its id. For
    id 2, which is the end token of the model, it uses the highest id of the sentence instead. The highest id is correct
    in both cases.

    Returns:
        The tokenizer. It adds ``<s>`` at the start and the end token at the end, pads on the right, and truncates to
        `MAX_TOKENS`.
    """
    core = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    vocabulary[_END] = len(vocabulary)
    raw: Any = Tokenizer.from_str(json.dumps(core))
    raw.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {_END}",
        special_tokens=[("<s>", vocabulary["<s>"]), (_END, vocabulary[_END])],
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=_END,
        unk_token="<unk>",
        padding_side="right",
        model_max_length=MAX_TOKENS,
    )
    return tokenizer


def make_text_model(tower: Any) -> CLIPModel:
    """Build an untrained CLIP model with the vision tower of the checkpoint.

    Args:
        tower: The vision tower; its weights are copied.

    Returns:
        The model. Only the parameters that `train_text` trains require gradients.
    """
    tokenizer = make_text_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        projection_dim=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=tower.config.to_dict(), projection_dim=64)
    model: Any = CLIPModel(config)
    model.vision_model.load_state_dict(tower.state_dict())
    model.vision_model.requires_grad_(False)
    model.vision_model.post_layernorm.requires_grad_(True)
    clip: CLIPModel = model
    return clip


def _tile_contents(board: Board) -> Integers:
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
    cls, patches, contents = [], [], []
    for first in range(start, start + count, 16):
        batch = [make_board(index, split) for index in range(first, min(first + 16, start + count))]
        hidden = model.vision_model(make_tiles(batch)[0], output_hidden_states=True).hidden_states
        cls.append(hidden[-1][:, 0].clone())
        patches.append(hidden[-2][:, 1:].half())
        contents += [_tile_contents(board) for board in batch]
    return Cache(torch.cat(cls), torch.cat(patches), np.concatenate(contents))


def draw_caption(rng: np.random.Generator, contents: Integers) -> Caption:
    """Draw a random sentence about a tile.

    Args:
        rng: The random generator.
        contents: Content of the tile, `[1 + items, 6]`, see `Cache`.

    Returns:
        The sentence. For a tile without items it describes the paper, and for the base tile it never contains a number.
    """
    items = contents[contents[:, 0] == 1]
    row = items[rng.integers(len(items))] if len(items) and rng.random() < 0.9 else contents[0]
    templates: tuple[tuple[str, str], ...] = _ABOUT_ITEM if row[0] else _ABOUT_PAPER
    if row[3] >= 0 and rng.random() < 0.25:
        templates = _ABOUT_NUMBER
    template, attributes = templates[rng.integers(len(templates))]
    is_item, shape, color, tens, units, paper = (int(value) for value in row)
    text = template.format(shape=SHAPES[shape], color=COLORS[color], number=10 * tens + units, paper=PAPERS[paper])
    if rng.random() < 0.2:
        text = _UNKNOWN * int(rng.integers(1, 5)) + text
    required = (
        is_item if is_item else ANY,
        shape if "s" in attributes else ANY,
        color if "c" in attributes else ANY,
        tens if "n" in attributes else ANY,
        units if "n" in attributes else ANY,
        paper if "p" in attributes else ANY,
    )
    return Caption(text, required)


def match_captions(captions: Sequence[Caption], contents: Integers) -> tuple[Tensor, Tensor]:
    """Return which tiles match which sentences.

    Args:
        captions: The sentences.
        contents: Content of the tiles, `[tiles, 1 + items, 6]`, see `Cache`.

    Returns:
        Whether a tile matches a sentence, and whether this is determined, both bool `[captions, tiles]`. It is not
        determined for a number and a base tile, which is too coarse to show numbers.
    """
    required = np.array([caption.required for caption in captions])[:, None, None]
    tiles = contents[None]
    fits = (required == ANY) | (required == tiles)
    certain = fits.all(-1).any(-1)
    possible = (fits | (tiles == ILLEGIBLE)).all(-1).any(-1)
    return torch.from_numpy(certain), torch.from_numpy(certain | ~possible)


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


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the normalized embeddings of sentences, `[texts, dims]`."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    pooled = model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def embed_features(model: Any, features: Tensor) -> Tensor:
    """Return the normalized embeddings of CLS or patch features in the space of the sentences, `[..., dims]`."""
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(features)), dim=-1)


def text_step(
    model: Any, tokenizer: Any, cache: Cache, seed: int, step: int, patches: float
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step.

    Args:
        model: The CLIP model.
        tokenizer: The tokenizer of the text tower.
        cache: The tiles.
        seed: Seed of the random tiles and sentences.
        step: Index of the step.
        patches: Weight of the loss on patches.

    Returns:
        The loss and the scores.
    """
    rng = np.random.default_rng((seed, 3, step))
    indices = rng.choice(len(cache.contents), size=min(BATCH, len(cache.contents)), replace=False)
    contents = cache.contents[indices]
    captions = [draw_caption(rng, rows) for rows in contents]
    match, is_determined = match_captions(captions, contents)
    texts = embed_texts(model, tokenizer, [caption.text for caption in captions])
    scale = model.logit_scale.exp()
    similarity = texts @ embed_features(model, cache.cls[indices]).T
    loss = contrastive_loss(scale * similarity, match, is_determined)
    best = similarity.masked_fill(~is_determined, -2).argmax(1, keepdim=True)
    scores = {"cls": loss.item(), "found": match.gather(1, best).float().mean().item()}
    if patches:
        local = embed_features(model, cache.patches[indices].float())
        by_patch = torch.einsum("cd,tpd->ctp", texts, local)
        # The most similar patches represent the tile, because the position of an item is not used.
        pooled = (by_patch * (10 * by_patch).softmax(-1)).sum(-1)
        part = contrastive_loss(scale * pooled, match, is_determined)
        loss = loss + patches * part
        scores["patches"] = part.item()
    return loss, scores


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


def export_text(model: Any, folder: Path) -> None:
    """Write a CLIP checkpoint folder of transformers in half precision.

    Args:
        model: The model in float32; it is not changed.
        folder: Path of the folder; an existing folder is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    half_model: Any = CLIPModel(model.config)
    half_model.load_state_dict(model.state_dict())
    half_model.to(torch.float16).save_pretrained(folder)
    make_text_tokenizer().save_pretrained(folder)
    # The files use half precision for size. The model loads in single precision, because half is slow on a CPU.
    settings = json.loads((folder / "config.json").read_text())
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def train_text(
    out: Path, *, seed: int = 0, steps: int = STEPS, boards: int = BOARDS, patches: float = 1.0
) -> CLIPModel:
    """Train the text tower and export ``out/text``.

    Args:
        out: Folder of the log and the result.
        seed: Seed of weights and data.
        steps: Number of training steps.
        boards: Number of training boards.
        patches: Weight of the loss on patches; 0 trains only the CLS token, as in CLIP.

    Returns:
        The trained model.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    since = time.monotonic()
    vlm: Any = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32)
    model: Any = make_text_model(vlm.model.vision_tower).eval()
    tokenizer = make_text_tokenizer()
    cache = read_boards(model, boards, "train", 200_000_000 + 1_000_000 * seed)
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
            loss, scores = text_step(model, tokenizer, cache, seed, step, patches)
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
    export_text(model, out / "text")
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
    parser.add_argument("--patches", type=float, default=1.0, help="weight of the loss on patches, 0 as in CLIP")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = train_text(
        options.out, seed=options.seed, steps=options.steps, boards=options.boards, patches=options.patches
    )
    for name, (value, number) in measure_auc(model, make_text_tokenizer()).items():
        print(json.dumps({"what": name, "value": round(value, 3), "questions": number}))


if __name__ == "__main__":
    main()
