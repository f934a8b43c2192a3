"""Accuracy of strategies on the embedded model's held-out boards, with intervals.

Run it: ``python -m tokenprune.experiments.heldout --number 200``

Every board is encoded once; all strategies and budgets share that encoding, and only the LLM runs again. Answers are
generated greedily, all questions of a board in one batch. Questions of one board are not independent, so intervals come
from a bootstrap that resamples boards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenprune.adapter import Encoding, find_adapter
from tokenprune.attach import Run
from tokenprune.catalogue import strategies
from tokenprune.image import Signal
from tokenprune.models import mini
from tokenprune.models.mini.boards import Board, boards
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import HiRED
from tokenprune.strategies.components import (
    BaseTileOnly,
    GlobalTopAllocation,
    RandomSelection,
    SubImagesOnly,
    UniformAllocation,
    UniformStride,
)

BUDGETS = (0.05, 0.1, 0.2, 0.4)


def compared() -> dict[str, TokenReducer]:
    """Return the compared strategies by name; their budget is set later."""
    everywhere = UniformAllocation()
    shipped: dict[str, Any] = {name: kind for name, kind in strategies().items() if name != "HiRED"}
    return {
        "HiRED": HiRED(),
        "HiRED, positions preserved": HiRED(positions="preserve"),
        "HiRED.paper": HiRED.paper(),
        "HiRED.release": HiRED.release(),
        "TopAttention, one pool": HiRED(allocation=GlobalTopAllocation()),
        "TopAttention, sub-images only": HiRED(allocation=SubImagesOnly(pooled=True)),
        "TopAttention, base tile only": HiRED(allocation=BaseTileOnly()),
        **{name: kind() for name, kind in shipped.items()},
        "UniformStride": HiRED(allocation=everywhere, selection=UniformStride()),
        **{f"Random, seed {s}": HiRED(allocation=everywhere, selection=RandomSelection(s)) for s in range(3)},
    }


def grid(budgets: Sequence[float]) -> Iterator[tuple[str, float, TokenReducer]]:
    """Yield every compared setting as (name, budget, strategy), full tokens first."""
    yield "full", 1.0, HiRED(1.0)
    for budget in budgets:
        for name, reducer in compared().items():
            yield name, budget, replace(reducer, budget=budget)


def answer(
    model: Any, processor: Any, encoding: Encoding, inputs: Mapping[str, Any], reducer: TokenReducer
) -> tuple[list[str], Run]:
    """Answer several questions about one encoded image.

    Args:
        model: the model.
        processor: its processor.
        encoding: the image, encoded with the signals that the strategy needs.
        inputs: text inputs of one prompt per question, `[questions, length]`.
        reducer: the strategy.
    """
    run = Run(reducer, find_adapter(model))
    reduced, rows = run.reduced(dict(inputs), generating=True, encoding=encoding.repeated(len(inputs["input_ids"])))
    out = model.generate(**reduced, max_new_tokens=4, do_sample=False)
    width = inputs["input_ids"].shape[1] if rows is None else rows.index.shape[1]
    return [text.strip() for text in processor.batch_decode(out[:, width:], skip_special_tokens=True)], run


def measure_board(
    model: Any, processor: Any, board: Board, budgets: Sequence[float]
) -> Iterator[tuple[str, float, list[bool], Run]]:
    """Yield (name, budget, right or wrong per question, run) of every setting for one board."""
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        for question in board.questions
    ]
    prompts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    one = processor(images=[board.image], text=prompts[:1], return_tensors="pt")
    every = processor(images=[board.image] * len(prompts), text=prompts, return_tensors="pt", padding=True)
    text = {name: every[name] for name in ("input_ids", "attention_mask")}
    needs: list[Signal] = [signal for _, _, reducer in grid(budgets) for signal in reducer.needs]
    with torch.no_grad():
        encoding = find_adapter(model).encode(one, needs)
        for name, budget, reducer in grid(budgets):
            texts, run = answer(model, processor, encoding, text, reducer)
            right = ["".join(t.split()) == q.answer for t, q in zip(texts, board.questions, strict=True)]
            yield name, budget, right, run


def interval(right: Sequence[NDArray[np.int64]], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Return a mean over questions and its 95 % interval from a bootstrap over boards.

    Args:
        right: per board, 1 or 0 (or a difference of two such) for each question.
        seed: seed of the bootstrap.
        draws: bootstrap samples.
    """
    sums = np.array([board.sum() for board in right], dtype=float)
    sizes = np.array([len(board) for board in right], dtype=float)
    chosen = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / sizes.sum()), float(low), float(high)


def table(results: Mapping[tuple[str, float], Sequence[NDArray[np.int64]]], budgets: Sequence[float]) -> str:
    """Return the results as a Markdown table, strategies by budgets."""

    def cell(key: tuple[str, float]) -> str:
        mean, low, high = interval(results[key])
        return f"{mean:.1%} [{low:.1%}, {high:.1%}]"

    lines = [f"| strategy | {' | '.join(f'{budget:.0%}' for budget in budgets)} |", "|---|" + "---|" * len(budgets)]
    lines += [f"| {name} | {' | '.join(cell((name, budget)) for budget in budgets)} |" for name in compared()]
    return "\n".join([f"full tokens: {cell(('full', 1.0))}", "", *lines])


def main(number: int = 200, budgets: list[float] | None = None, out: str | None = None, start: int = 0) -> None:
    """Measure all strategies on held-out boards and print the tables.

    Args:
        number: number of boards; each has about 20 questions.
        budgets: budgets as ratios.
        out: file for the results as JSON, one entry per question.
        start: index of the first board.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    chosen = tuple(budgets or BUDGETS)
    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(mini.path())
    results: dict[tuple[str, float], list[NDArray[np.int64]]] = {}
    kinds: list[list[tuple[str, str]]] = []
    kept: dict[tuple[str, float], list[tuple[int, int]]] = {}
    began = time.monotonic()
    for board in boards(number, "heldout", start):
        kinds.append([(question.type, question.needs) for question in board.questions])
        for name, budget, right, run in measure_board(model, processor, board, chosen):
            results.setdefault((name, budget), []).append(np.array(right, dtype=np.int64))
            image = run.account.images[0]
            kept.setdefault((name, budget), []).append((image.asked, image.kept))
    questions = sum(map(len, kinds))
    print(f"{number} held-out boards, {questions} questions, {time.monotonic() - began:.0f} s")
    print(table(results, chosen))
    print("\ndifference of HiRED, paired, by budget:")
    for budget in chosen:
        for other in ("full", *(name for name in compared() if name != "HiRED")):
            against = results[other, 1.0 if other == "full" else budget]
            mean, low, high = interval([a - b for a, b in zip(results["HiRED", budget], against, strict=True)])
            seen = "" if low > 0 or high < 0 else "  (no difference seen)"
            print(f"  {budget:4.0%} against {other:30} {mean:+.1%} [{low:+.1%}, {high:+.1%}]{seen}")
    print("\nby question type (full | HiRED at each budget):")
    for kind in sorted({pair for board in kinds for pair in board}):
        row = []
        for key in [("full", 1.0), *(("HiRED", budget) for budget in chosen)]:
            parts = [r[[k == kind for k in ks]] for r, ks in zip(results[key], kinds, strict=True)]
            row.append(np.concatenate(parts))
        print(
            f"  {kind[0]:14} needs {kind[1]:7} n={len(row[0]):5}  " + " | ".join(f"{part.mean():.1%}" for part in row)
        )
    print("\ntokens kept of asked, mean over boards:")
    for key, pairs in kept.items():
        asked, have = np.array(pairs).mean(axis=0)
        print(f"  {key[0]:30} {key[1]:4.0%}  {have:.1f} of {asked:.1f}")
    if out is not None:
        record = {f"{name} @ {budget}": [r.tolist() for r in rows] for (name, budget), rows in results.items()}
        Path(out).write_text(json.dumps({"kinds": kinds, "right": record}))


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
