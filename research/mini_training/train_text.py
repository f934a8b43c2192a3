"""Trains the text tower of the miniature model: ``python -m research.mini_training.train_text --out FOLDER``.

The result is an ordinary `transformers.CLIPModel` whose vision tower is the checkpoint's, for methods that compare the
question with the patches. Training is CLIP's: tiles of training boards and sentences about what a tile shows are pulled
together, all others apart. The vision tower is frozen, so its outputs are computed once; text tower, both projections,
the last LayerNorm of the vision tower (which the vision-language model does not use) and the temperature learn.

CLIP compares CLS alone, and then patches mean little. Here the patches of the feature layer learn by a second term of
the same kind, pooled by how well they fit a sentence, much as in patch-aligned contrastive learning (arXiv 2212.04994).
This training is not told where in a tile a thing is; the tower below was, see `research.mini_training.train`.

One sentence is often true of several tiles, so the loss is told by ground truth which tiles show what each sentence
talks about, and takes all of them for matches (contrastive learning in image, text and label space, arXiv 2204.03610).
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
from research.mini_training.lessons import TOKENS, lesson, packing, tiles_of
from tokenprune.models import mini
from tokenprune.models.mini.boards import COLORS, PAPERS, SHAPES, Board, Split, make_board

__all__ = [
    "Cache",
    "Caption",
    "cls_scores",
    "export_text",
    "make_text_model",
    "make_text_tokenizer",
    "matches",
    "measure",
    "patch_scores",
    "read_boards",
    "train_text",
    "write_caption",
]

BOARDS = 3000
"""Training boards; each is seen several times, its tower outputs computed once."""
STEPS = 1000
BATCH = 128
"""Tiles in a step, with one sentence each."""
RATE = 2e-3
MOST_WORDS = 32
"""Positions of the text tower."""
ANY, NOTHING, ILLEGIBLE = -1, -2, -3
"""In a caption: whatever it may be; in a tile: there is none, there is one that is too coarse to be read."""

Integers = NDArray[np.int64]
_END = "<|endoftext|>"
_ABOUT_ITEM = (
    *(("what number is on the {colour} {shape}?", "sc"), ("what number is on the {shape}?", "s")),
    *(("what number is on the {colour} shape?", "c"), ("what color is the {shape}?", "s")),
    *(("what shape is {colour}?", "c"), ("is the {colour} {shape} in the left or right half?", "sc")),
    *(("is the {colour} {shape} in the top or bottom half?", "sc"), ("how many shapes are there?", "")),
    *(("{colour} {shape}", "sc"), ("the {shape} is {colour}", "sc"), ("this is the {colour} {shape}", "sc")),
    *(("the {shape}", "s"), ("there is the {shape}", "s"), ("the {colour} shape", "c"), ("it is {colour}", "c")),
)
_ABOUT_NUMBER = (
    *(("number {number}", "n"), ("number {number} on the {colour} {shape}", "scn")),
    *(("the number on the {shape} is {number}", "sn"), ("{number} is on the {colour} shape", "cn")),
)
_ABOUT_PAPER = (("{paper} paper", "p"), ("the paper is {paper}", "p"), ("what paper is this?", ""))
_UNKNOWN = "please "
"""A word that the vocabulary lacks. People who ask do not know the vocabulary; a few such words in front of a sentence
must not change what it is about."""


@dataclass(frozen=True)
class Caption:
    """A sentence and what a tile must show for it to be about that tile.

    Attributes:
        text: The sentence.
        demands: Class of thing, shape, color, tens, units and paper, `ANY` where the sentence does not care.
    """

    text: str
    demands: tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Cache:
    """What the frozen tower makes of tiles, and what the tiles show.

    Attributes:
        whole: CLS after the last layer, `[tiles, width]`.
        patches: Patches after the feature layer, half precision, `[tiles, tokens, width]`.
        shows: Class of thing (1), shape, color, tens, units and paper of what is in a tile, one row an item. The first
            row of a tile is its paper, unused rows repeat it, `[tiles, 1 + items, 6]`.
    """

    whole: Tensor
    patches: Tensor
    shows: Integers


def make_text_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of the text tower: that of the model, with an end token as CLIP has it.

    The words keep their ids. The end token is a new one with the highest id: `transformers` finds the end by its id,
    except for id 2, which the model's own end token has, where it takes the highest id of the sentence. The highest id
    is right by both rules.

    Returns:
        The tokenizer; it puts ``<s>`` in front and the end token behind, pads on the right and cuts at `MOST_WORDS`.
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
        model_max_length=MOST_WORDS,
    )
    return tokenizer


def make_text_model(tower: Any) -> CLIPModel:
    """Build an untrained CLIP model around the vision tower of the checkpoint.

    Args:
        tower: The vision tower; its weights are copied.

    Returns:
        The model, of which only what `train_text` trains asks for gradients.
    """
    tokenizer = make_text_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MOST_WORDS,
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


def _shows(board: Board) -> Integers:
    """Return what the tiles of a board show, see `Cache`, `[tiles, 1 + 4, 6]`."""
    truth = lesson(board)
    tiles = 1 + board.grid[0] * board.grid[1]
    empty = [0, NOTHING, NOTHING, NOTHING, NOTHING, board.paper]
    shows = np.full((tiles, 5, 6), empty, np.int64)
    for number, item in enumerate(board.items):
        for tile in np.flatnonzero(truth.shown[number].any(-1)):
            digits = divmod(item.number, 10) if tile else (ILLEGIBLE, ILLEGIBLE)
            shows[tile, 1 + number] = [1, item.shape, item.color, *digits, board.paper]
    return shows


@torch.no_grad()
def read_boards(model: Any, count: int, split: Split = "train", start: int = 0) -> Cache:
    """Run boards through the frozen tower.

    Args:
        model: The CLIP model.
        count: How many boards.
        split: Split of the boards.
        start: The first board.

    Returns:
        What the tower makes of all their tiles.
    """
    whole, patches, shows = [], [], []
    for first in range(start, start + count, 16):
        some = [make_board(index, split) for index in range(first, min(first + 16, start + count))]
        hidden = model.vision_model(tiles_of(some)[0], output_hidden_states=True).hidden_states
        whole.append(hidden[-1][:, 0].clone())
        patches.append(hidden[-2][:, 1:].half())
        shows += [_shows(board) for board in some]
    return Cache(torch.cat(whole), torch.cat(patches), np.concatenate(shows))


def write_caption(rng: np.random.Generator, shows: Integers) -> Caption:
    """Draw a sentence about a tile.

    Args:
        rng: The source of chance.
        shows: What the tile shows, `[1 + items, 6]`, see `Cache`.

    Returns:
        The sentence. A tile without items is only told about its paper, the base tile never about numbers.
    """
    things = shows[shows[:, 0] == 1]
    row = things[rng.integers(len(things))] if len(things) and rng.random() < 0.9 else shows[0]
    templates: tuple[tuple[str, str], ...] = _ABOUT_ITEM if row[0] else _ABOUT_PAPER
    if row[3] >= 0 and rng.random() < 0.25:
        templates = _ABOUT_NUMBER
    template, named = templates[rng.integers(len(templates))]
    thing, shape, color, tens, units, paper = (int(value) for value in row)
    text = template.format(shape=SHAPES[shape], color=COLORS[color], number=10 * tens + units, paper=PAPERS[paper])
    if rng.random() < 0.2:
        text = _UNKNOWN * int(rng.integers(1, 5)) + text
    demands = (
        thing if thing else ANY,
        shape if "s" in named else ANY,
        color if "c" in named else ANY,
        tens if "n" in named else ANY,
        units if "n" in named else ANY,
        paper if "p" in named else ANY,
    )
    return Caption(text, demands)


def matches(captions: Sequence[Caption], shows: Integers) -> tuple[Tensor, Tensor]:
    """Return which tiles show what the sentences are about.

    Args:
        captions: The sentences.
        shows: What the tiles show, `[tiles, 1 + items, 6]`, see `Cache`.

    Returns:
        Whether a tile matches a sentence, and whether that is known: a base tile does not tell whether the number is
        right, bool `[captions, tiles]` both.
    """
    demands = np.array([caption.demands for caption in captions])[:, None, None]
    there = shows[None]
    fits = (demands == ANY) | (demands == there)
    certain = fits.all(-1).any(-1)
    possible = (fits | (there == ILLEGIBLE)).all(-1).any(-1)
    return torch.from_numpy(certain), torch.from_numpy(certain | ~possible)


def contrast(logits: Tensor, match: Tensor, known: Tensor) -> Tensor:
    """Return the contrastive loss with several matches a row, over rows and over columns.

    Args:
        logits: Scaled similarity of sentences and tiles, `[captions, tiles]`.
        match: Whether they match, bool `[captions, tiles]`.
        known: Pairs that are not known are left out, bool `[captions, tiles]`.

    Returns:
        The loss.
    """
    logits = logits.masked_fill(~known, -1e4)
    loss = logits.new_zeros(())
    for dim in (0, 1):
        count = match.sum(dim)
        part = -(F.log_softmax(logits, dim) * match).sum(dim) / count.clamp(min=1)
        loss = loss + part[count > 0].mean() / 2
    return loss


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the unit vectors of sentences, `[texts, dims]`."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    pooled = model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def embed_features(model: Any, features: Tensor) -> Tensor:
    """Return the unit vectors of CLS or patch features in the space of the sentences, `[..., dims]`."""
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(features)), dim=-1)


def text_step(
    model: Any, tokenizer: Any, cache: Cache, seed: int, step: int, patches: float
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step.

    Args:
        model: The CLIP model.
        tokenizer: Its tokenizer.
        cache: The tiles to draw from.
        seed: Seed of the draw.
        step: Number of the step.
        patches: Weight of the loss on patches.

    Returns:
        The loss and the scores.
    """
    rng = np.random.default_rng((seed, 3, step))
    chosen = rng.choice(len(cache.shows), size=min(BATCH, len(cache.shows)), replace=False)
    shows = cache.shows[chosen]
    captions = [write_caption(rng, one) for one in shows]
    match, known = matches(captions, shows)
    texts = embed_texts(model, tokenizer, [caption.text for caption in captions])
    scale = model.logit_scale.exp()
    similar = texts @ embed_features(model, cache.whole[chosen]).T
    loss = contrast(scale * similar, match, known)
    found = match.gather(1, similar.masked_fill(~known, -2).argmax(1, keepdim=True)).float().mean()
    scores = {"cls": loss.item(), "found": found.item()}
    if patches:
        local = embed_features(model, cache.patches[chosen].float())
        each = torch.einsum("cd,tpd->ctp", texts, local)
        # The patches that fit a sentence best stand for the tile: nobody says where things are.
        pooled = (each * (10 * each).softmax(-1)).sum(-1)
        part = contrast(scale * pooled, match, known)
        loss = loss + patches * part
        scores["patches"] = part.item()
    return loss, scores


@torch.no_grad()
def patch_scores(model: Any, tokenizer: Any, board: Board, questions: Sequence[str]) -> Tensor:
    """Return the cosine of every patch of the feature layer and every question.

    Args:
        model: The CLIP model.
        tokenizer: Its tokenizer.
        board: The board.
        questions: The questions.

    Returns:
        The cosines, base tile first, `[questions, tiles, tokens]`.
    """
    hidden = model.vision_model(tiles_of([board])[0], output_hidden_states=True).hidden_states
    local = embed_features(model, hidden[-2][:, 1:])
    return torch.einsum("qd,tpd->qtp", embed_texts(model, tokenizer, questions), local)


@torch.no_grad()
def cls_scores(model: Any, tokenizer: Any, board: Board, questions: Sequence[str]) -> Tensor:
    """Return the cosine of every tile as a whole (CLS of the last layer) and every question, as CLIP compares them.

    Args:
        model: The CLIP model.
        tokenizer: Its tokenizer.
        board: The board.
        questions: The questions.

    Returns:
        The cosines, base tile first, `[questions, tiles]`.
    """
    whole = model.vision_model(tiles_of([board])[0]).last_hidden_state[:, 0]
    return embed_texts(model, tokenizer, questions) @ embed_features(model, whole).T


def _auc(high: Tensor, low: Tensor) -> float:
    """Return how often a value of the first is above one of the second, ties counted half."""
    above = (high[:, None] > low).float() + 0.5 * (high[:, None] == low).float()
    return above.mean().item()


def measure(model: Any, tokenizer: Any, start: int = 2000, count: int = 100) -> dict[str, tuple[float, int]]:
    """Return how well the cosines tell the patches that a question is about, on held-out boards, sub-images only.

    Args:
        model: The CLIP model.
        tokenizer: Its tokenizer.
        start: The first board.
        count: How many boards.

    Returns:
        Mean area under the curve and number of questions, for questions about one item by what its patches are compared
        with: ``others`` (all other patches), ``background`` (patches that no item touches), ``items`` (patches of other
        items); and ``others`` by type of question. ``tile`` is the share of questions whose item is in the sub-image
        with the best CLS, ``tile by chance`` what a blind choice would reach.
    """
    found: dict[str, list[float]] = {}
    for index in range(start, start + count):
        board = make_board(index, "heldout")
        truth = lesson(board)
        asked = [question for question in board.questions if question.about]
        texts = [question.text for question in asked]
        scores = patch_scores(model, tokenizer, board, texts).flatten(1)
        whole = cls_scores(model, tokenizer, board, texts)[:, 1:]
        order, _ = packing(board)
        place = order[order >= TOKENS]  # sub-images without the padding, which the model never sees
        empty = torch.from_numpy(truth.dense["shape"].reshape(-1)[place]) == len(SHAPES)
        shown = torch.from_numpy(truth.shown.reshape(len(board.items), -1)[:, place])
        for question, score, fit in zip(asked, scores[:, place], whole, strict=True):
            about = list(question.about)
            mine = shown[about].any(0)
            rest = {question.type: ~mine}
            if question.type != "count":
                rest |= {"others": ~mine, "background": empty, "items": shown.any(0) & ~mine}
                holds = torch.from_numpy(truth.shown[about[0], 1:]).any(-1).float()
                found.setdefault("tile", []).append(holds[fit.argmax()].item())
                found.setdefault("tile by chance", []).append(holds.mean().item())
            for name, others in rest.items():
                if mine.any() and others.any():
                    found.setdefault(name, []).append(_auc(score[mine], score[others]))
    return {name: (sum(values) / len(values), len(values)) for name, values in found.items()}


def export_text(model: Any, folder: Path) -> None:
    """Write an ordinary CLIP folder in half precision.

    Args:
        model: The model in fp32; it is not changed.
        folder: Where it shall stand; an older one is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    twin: Any = CLIPModel(model.config)
    twin.load_state_dict(model.state_dict())
    twin.to(torch.float16).save_pretrained(folder)
    make_text_tokenizer().save_pretrained(folder)
    # Stored in half precision for size, loaded in single precision: half is slow on a CPU.
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
        steps: Steps of training.
        boards: Training boards.
        patches: Weight of the loss on patches; 0 trains CLS alone, as CLIP does.

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
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in learning if one.ndim > 1], "weight_decay": 0.05},
        {"params": [one for one in learning if one.ndim < 2], "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    print(f"{len(cache.shows)} tiles read after {time.monotonic() - since:.0f} s", flush=True)
    with (out / "text.jsonl").open("w") as log:
        for step in range(steps):
            factor = min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in opt.param_groups:
                group["lr"] = RATE * factor
            loss, scores = text_step(model, tokenizer, cache, seed, step, patches)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
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
    """Read the command line, train and print what `measure` finds on held-out boards."""
    parser = argparse.ArgumentParser(description="Train the text tower of the miniature model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the log and the result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--boards", type=int, default=BOARDS, help="training boards")
    parser.add_argument("--patches", type=float, default=1.0, help="weight of the loss on patches, 0 as in CLIP")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = train_text(
        options.out, seed=options.seed, steps=options.steps, boards=options.boards, patches=options.patches
    )
    for name, (value, number) in measure(model, make_text_tokenizer()).items():
        print(json.dumps({"what": name, "value": round(value, 3), "questions": number}))


if __name__ == "__main__":
    main()
