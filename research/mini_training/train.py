"""Trains the miniature model from nothing: ``python -m research.mini_training.train --out FOLDER``.

Stage 1 teaches the vision tower. Heads on the CLS token after every layer name what is in a tile, and heads on every
patch of the feature layer name what the patch shows. This gives the CLS attention a meaning, as CLIP's pre-training
does; no loss is put on attention itself. The heads are thrown away. Stage 2 teaches projector and LLM to answer, the
tower frozen at first and trained along at the end.

In most steps of stage 2 a part of the visual tokens is removed, so that the LLM learns to live with gaps. What is
removed is drawn at random (single tokens, a rate for each tile, blocks, whole tiles, objects and background at rates of
their own); no strategy, no attention and no score ever chooses. A question is asked only while the tokens that show its
answer are left. The tower learns from complete images only, so it never learns to prepare for gaps.

Data, subsets and order follow from the step number, so a run that was stopped goes on as if it had not been:
bit for bit with one thread, up to rounding with more.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration

from research.mini_training.build import export, make_config, make_tokenizer
from research.mini_training.lessons import (
    DENSE,
    IGNORE,
    PLACES,
    SEVERAL,
    TOKENS,
    Integers,
    Lesson,
    answerable,
    lesson,
    packing,
    random_subset,
    tiles_of,
)
from tokenprune.models.mini.boards import GRIDS, Board, Question, make_board

IMAGES = 16
"""Images in a step."""
QUESTIONS = 10
"""Questions about each image in a step of stage 2."""
TOWER_STEPS = 1100
READER_STEPS = 2320
CROWDED_UNTIL = 500
"""Until this step of stage 1 three of four steps show crowded boards: more to learn in every image."""
SMALL_UNTIL = 250
"""Until this step of stage 2 only boards of two tiles are shown: the same lessons in shorter sequences."""
FULL_UNTIL = 250
"""Until this step of stage 2 no token is removed."""
TOGETHER_FROM = 900
"""From this step of stage 2 the tower learns along, in steps without gaps."""
HARD_FROM = 1000
"""From this step of stage 2 fewer steps have gaps, and what is learned late is asked more often."""
PLACES_UNTIL = 1300
"""Until this step of stage 2 some questions ask where things are; they were not learned and then left out."""
PLACES_FROM = 1820
"""From this step of stage 2 patches of the base tile are taught to name the half of the image that their item lies
in, and questions about it are asked again."""
FULL_AGAIN_UNTIL = 1980
"""From PLACES_FROM until this step no token is removed: the tower learns in complete images only."""
READING_PLACES = range(2100, 2160)
"""In these steps of stage 2 the tower is frozen, the rate high, and most questions ask where things are."""
TOWER_RATES = ((0, 0.05), (19, 1.0), (605, 1.0), (TOWER_STEPS, 0.03))
"""Rates of stage 1 as (step, factor), linear between."""
READER_RATES = (
    *((0, 0.05), (19, 1.0), (699, 1.0), (700, 0.3), (1200, 0.25), (1299, 0.2236)),
    *((1300, 0.1), (1819, 0.005), (1820, 0.02), (1840, 0.25), (1979, 0.25), (1980, 0.12), (2080, 0.12)),
    *((2099, 0.1079), (2100, 0.4), (2160, 0.4), (2161, 0.1), (READER_STEPS, 0.005)),
)
"""Rates of stage 2. At the full rate colors and shapes are learned, and at a third of it which number is whose."""


class Heads(nn.Module):
    """The heads of stage 1; they are not part of the model."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, sum(DENSE.values()))
        several = sum(SEVERAL.values())
        self.cls = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, several)) for _ in range(layers))
        self.places = nn.Linear(width, sum(PLACES.values()))
        self.weights = [0.3] * (layers - 2) + [1.0] * 2

    def forward(
        self, hidden: Sequence[Tensor], lessons: Sequence[Lesson], *, places: bool = False
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of the tower and the shares of right names.

        Args:
            hidden: CLS and patches after the embeddings and after each layer, `[tiles, 1 + tokens, width]` each.
            lessons: The ground truth of the boards that the tiles belong to.
            places: Whether patches of items also name the half of the image.

        Returns:
            The loss and the shares.
        """
        loss, scores = hidden[0].new_zeros(()), {}
        parts = self.dense(hidden[-2][:, 1:]).flatten(0, 1).split(list(DENSE.values()), dim=1)
        for name, logits in zip(DENSE, parts, strict=True):
            target = torch.from_numpy(np.concatenate([one.dense[name] for one in lessons])).flatten()
            empty = name in ("shape", "colour", "tens", "units")
            weight = torch.ones(logits.shape[1])
            if empty:  # Most patches show nothing; unweighted, that answer would drown the others.
                weight[-1] = 0.1
            part = F.cross_entropy(logits, target, weight=weight, ignore_index=IGNORE)
            loss = loss + (1.0 if empty else 0.15) * part
            asked = (target != IGNORE) & ((target != logits.shape[1] - 1) if empty else True)
            scores[name] = (logits.argmax(1) == target)[asked].float().mean().item()
        if places:
            halves = self.places(hidden[-2][:, 1:]).flatten(0, 1).split(list(PLACES.values()), dim=1)
            weight = torch.tensor([2.0, 2.0, 0.5])
            for name, logits in zip(PLACES, halves, strict=True):
                target = torch.from_numpy(np.concatenate([one.places[name] for one in lessons])).flatten()
                loss = loss + 2.0 * F.cross_entropy(logits, target, weight=weight, ignore_index=IGNORE)
                known = (target == 0) | (target == 1)
                scores[name] = (logits.argmax(1) == target)[known].float().mean().item()
        target = torch.from_numpy(
            np.concatenate([np.concatenate([one.several[name] for name in SEVERAL], axis=1) for one in lessons])
        ).float()
        readable = torch.ones_like(target)
        is_base = torch.cat([torch.arange(len(one.dense["paper"])) == 0 for one in lessons])
        readable[is_base, SEVERAL["pair"] :] = 0
        for weight_of_layer, head, layer in zip(self.weights, self.cls, hidden[1:], strict=True):
            logits = head(layer[:, 0])
            part = F.binary_cross_entropy_with_logits(logits, target, weight=readable, reduction="sum")
            loss = loss + weight_of_layer * 8 * part / readable.sum()
        found = (logits > 0) == (target > 0)
        scores["cls"] = found[(target > 0) & (readable > 0)].float().mean().item()
        return loss, scores


def tower_output(model: Any, pixels: Tensor) -> tuple[Tensor, ...]:
    """Return CLS and patches after the embeddings and after each layer, `[tiles, 1 + tokens, width]` each."""
    hidden: tuple[Tensor, ...] = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return hidden


@dataclass(frozen=True)
class Prompt:
    """One training sequence: the image, then questions that see the image and themselves only.

    Attributes:
        places: Flat tile token at each visual position, -1 for a newline, `[visual]`.
        positions: Position ids of the visual tokens, `[visual]`.
        ids: Text of all questions with their answers, `[text]`.
        text_positions: Position ids of the text, `[text]`.
        block: Number of the question that a text token belongs to, `[text]`.
        labels: The next token where it is to be learned, `[text]`.
    """

    places: Integers
    positions: Integers
    ids: Integers
    text_positions: Integers
    block: Integers
    labels: Integers


def make_prompt(
    board: Board,
    truth: Lesson,
    rng: np.random.Generator,
    write: Callable[[str], list[int]],
    *,
    gaps: bool,
    more: dict[str, float],
) -> Prompt:
    """Draw which tokens of a board are there, and questions that they answer.

    Args:
        board: The board.
        truth: Its ground truth.
        rng: The source of chance.
        write: Turns text into token ids.
        gaps: Whether tokens are removed.
        more: How much more often than others a type of question is asked.

    Returns:
        The sequence.
    """
    kept = random_subset(rng, truth) if gaps else np.ones((len(truth.dense["paper"]), TOKENS), dtype=bool)
    order, line = packing(board)
    stays = (order >= 0) & kept.reshape(-1)[order]
    newlines = rng.choice(["kept rows", "all", "none"], p=[0.7, 0.2, 0.1]) if gaps else "all"
    if newlines == "all":
        stays |= order < 0
    elif newlines == "kept rows":
        stays |= (order < 0) & np.isin(line, line[stays & (line >= 0)])
    # An empty image cannot be asked about; the first token of the base tile always exists.
    stays[0] |= not stays.any()
    before = _PREFIX_LENGTH
    preserve = gaps and rng.random() < 0.3
    positions = before + (np.flatnonzero(stays) if preserve else np.arange(int(stays.sum())))
    text_start = before + (len(order) if preserve else len(positions))
    choices = [question for question in board.questions if answerable(question, truth, kept)]
    chance = np.array([_chance(question) * more.get(question.type, 1.0) for question in choices])
    size = min(QUESTIONS, len(choices))
    picked = rng.choice(len(choices), size=size, replace=False, p=chance / chance.sum())
    ids: list[int] = []
    at: list[int] = []
    block: list[int] = []
    labels: list[int] = []
    for number, index in enumerate(picked):
        asked = write(f"{choices[index].text} ASSISTANT:")
        answer = [*write(choices[index].answer), _END]
        ids += [*asked, *answer[:-1]]
        labels += [*[IGNORE] * (len(asked) - 1), *answer]
        at += range(text_start, text_start + len(asked) + len(answer) - 1)
        block += [number] * (len(asked) + len(answer) - 1)
    return Prompt(order[stays], positions, np.array(ids), np.array(at), np.array(block), np.array(labels))


def _chance(question: Question) -> float:
    """Questions about single items come once for each item; the others weigh as much as two of them."""
    return 1.0 if len(question.about) == 1 and question.type != "count" else 2.0


_PLACES = {"side": 6.0, "height": 6.0}
_HARD = {"colour": 0.4, "shape": 0.4, "paper": 0.4, "number_colour": 2.0, "side": 2.5, "height": 2.5, "order": 2.5}
_TOKENIZER = make_tokenizer()
_END = int(_TOKENIZER.eos_token_id)
_START: list[int] = _TOKENIZER("USER: <image>")["input_ids"][:-1]
_PREFIX_LENGTH = len(_START)


def make_writer() -> Callable[[str], list[int]]:
    """Return a function from text to token ids that remembers what it has seen."""
    known: dict[str, list[int]] = {}

    def write(text: str) -> list[int]:
        if text not in known:
            known[text] = _TOKENIZER(text, add_special_tokens=False)["input_ids"]
        return known[text]

    return write


def answer_loss(model: Any, features: Sequence[Tensor], prompts: Sequence[Prompt]) -> tuple[Tensor, float]:
    """Return the loss on the answers, and the share of questions whose answer is right in every token.

    Args:
        model: The model.
        features: Projected tokens of each image, `[tiles * tokens, dim]` each.
        prompts: What is shown and asked of each image.

    Returns:
        The loss and the share.
    """
    width = max(len(_START) + len(prompt.places) + len(prompt.ids) for prompt in prompts)
    shape = len(prompts), width
    positions, groups = np.zeros(shape, dtype=np.int64), np.full(shape, -2)
    labels, ids, places = np.full(shape, IGNORE), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    visual = np.zeros(shape, dtype=bool)
    first = 1
    for row, (feature, prompt) in enumerate(zip(features, prompts, strict=True)):
        begin = len(_START)
        middle, end = begin + len(prompt.places), begin + len(prompt.places) + len(prompt.ids)
        ids[row, :begin], ids[row, middle:end] = _START, prompt.ids
        positions[row, :begin] = np.arange(begin)
        positions[row, begin:middle], positions[row, middle:end] = prompt.positions, prompt.text_positions
        groups[row, :middle], groups[row, middle:end] = -1, prompt.block
        labels[row, middle:end] = prompt.labels
        # Row 0 of the table below is the newline.
        places[row, begin:middle] = np.where(prompt.places >= 0, prompt.places + first, 0)
        visual[row, begin:middle] = True
        first += len(feature)
    table = torch.cat([model.model.image_newline[None], *features])
    shown = torch.from_numpy(visual)
    embeds = model.get_input_embeddings()(torch.from_numpy(ids)).masked_scatter(
        shown[..., None], table[torch.from_numpy(places)[shown]]
    )
    group = torch.from_numpy(groups)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    sees = (group[:, None, :] == -1) | (group[:, None, :] == group[:, :, None])
    mask = (sees & causal)[:, None]
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=torch.from_numpy(positions),
        use_cache=False,
    ).last_hidden_state
    target = torch.from_numpy(labels)
    asked = target != IGNORE
    logits = model.lm_head(hidden[asked])
    loss = F.cross_entropy(logits, target[asked])
    wrong = (logits.argmax(1) != target[asked]).float()
    question = (torch.arange(shape[0])[:, None] * QUESTIONS + group)[asked]
    count = torch.zeros(shape[0] * QUESTIONS).index_add_(0, question, torch.ones(len(question)))
    failed = torch.zeros(shape[0] * QUESTIONS).index_add_(0, question, wrong)
    return loss, (failed[count > 0] == 0).float().mean().item()


def optimizers(model: Any, heads: Heads, *, reader: bool) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside layers and AdamW for everything else (embeddings, heads, vectors).

    Args:
        model: The model.
        heads: The heads of stage 1.
        reader: Whether projector and LLM are trained too.

    Returns:
        The two optimizers.
    """
    matrices: list[nn.Parameter] = []
    others = list(heads.parameters())
    for name, parameter in model.named_parameters():
        if "vision_tower" in name or reader:
            inside = parameter.ndim == 2 and ("layers" in name or "projector" in name)
            (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rates(opts: Sequence[torch.optim.Optimizer], step: int, rates: Sequence[tuple[int, float]]) -> None:
    """Set the rates of a step.

    Args:
        opts: The optimizers.
        step: The step.
        rates: Knots as (step, factor), linear between.
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
    loss, scores = heads(tower_output(model, tiles_of(boards)[0]), [lesson(board) for board in boards])
    return loss, scores


def reader_step(
    model: Any, heads: Heads, write: Callable[[str], list[int]], seed: int, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the scores of one step of stage 2."""
    rng = np.random.default_rng((seed, 2, step))
    start = 100_000_000 * seed + 50_000_000 + IMAGES * step
    if step < HARD_FROM:
        gaps = step >= FULL_UNTIL and step % 5 > 1
    else:
        gaps = (step + step // 6) % 3 > 1 if step < PLACES_UNTIL else (step + step // 6) % 2 > 0
        gaps &= not PLACES_FROM <= step < FULL_AGAIN_UNTIL
    # Grids with the same number of tiles go together, so that sequences are about equally long.
    alike = [grid for grid in GRIDS if grid[0] * grid[1] == (2 if step < SMALL_UNTIL else (2, 4, 3, 4, 2, 4)[step % 6])]
    orders, again = step < PLACES_UNTIL, step >= PLACES_FROM
    boards = [
        make_board(start + k, "train", grid=alike[k % len(alike)], places=orders or again, orders=orders)
        for k in range(IMAGES)
    ]
    truths = [lesson(board) for board in boards]
    pixels, tiles = tiles_of(boards)
    together = not gaps and step >= TOGETHER_FROM and step not in READING_PLACES
    with torch.set_grad_enabled(together):
        hidden = tower_output(model, pixels)
    features = model.model.multi_modal_projector(hidden[-2][:, 1:]).split(tiles)
    more = {} if step < HARD_FROM else _HARD if step < READING_PLACES.start else _PLACES
    prompts = [
        make_prompt(board, truth, rng, write, gaps=gaps, more=more) for board, truth in zip(boards, truths, strict=True)
    ]
    loss, right = answer_loss(model, [part.flatten(0, 1) for part in features], prompts)
    scores = {"gaps": float(gaps), "answers": loss.item(), "right": right}
    if together:
        tower, names = heads(hidden, truths, places=again)
        loss, scores = loss + (1.0 if again else 0.3) * tower, scores | names
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
        out: Folder of the state, the log and the result.
        seed: Seed of weights and data.
        tower_steps: Steps of stage 1.
        reader_steps: Steps of stage 2.
        resume: Go on from the state in ``out``.
        stop_after: Stop after so many steps of both stages, to be resumed later.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model: Any = LlavaNextForConditionalGeneration(make_config(_TOKENIZER))
    vision = model.config.vision_config
    heads = Heads(vision.hidden_size, vision.num_hidden_layers)
    write = make_writer()
    done, spent, opts = 0, 0.0, optimizers(model, heads, reader=False)
    if resume:
        state = torch.load(out / "state.pt", weights_only=True)
        done, spent = state["done"], state["seconds"]
        if done >= tower_steps:
            opts = optimizers(model, heads, reader=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        if done not in (tower_steps, tower_steps + PLACES_FROM):
            for opt, saved in zip(opts, state["optimisers"], strict=True):
                opt.load_state_dict(saved)
    since = time.monotonic() - spent
    model.train()
    while done < min(tower_steps + reader_steps, stop_after or tower_steps + reader_steps):
        if done in (tower_steps, tower_steps + PLACES_FROM):
            opts = optimizers(model, heads, reader=True)
        if done < tower_steps:
            set_rates(opts, done, TOWER_RATES)
            loss, scores = tower_step(model, heads, seed, done)
        else:
            set_rates(opts, done - tower_steps, READER_RATES)
            loss, scores = reader_step(model, heads, write, seed, done - tower_steps)
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
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the miniature model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state, the log and the result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS, help="steps of stage 1, fewer for a trial")
    parser.add_argument("--reader-steps", type=int, default=READER_STEPS, help="steps of stage 2, fewer for a trial")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--stop-after", type=int, help="stop after so many steps in all, to be resumed later")
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
