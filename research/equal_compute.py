"""Compares strategies before and inside the LLM at equal average tokens, on held-out boards with the embedded model.

Run it: ``python -m research.equal_compute``

*Average tokens* are the visual tokens of a prompt in one layer of the LLM, averaged over the layers: the "192 tokens"
of papers. With a cut before layer 1 of 3 layers, the first layer holds all tokens that entered, so that a strategy
inside the LLM alone never falls below a third of the tokens. A composition lets a strategy before the LLM drop tokens
first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from research.heldout import Answers, board_interval, measure_board
from tokenprune.budget import Budget
from tokenprune.decoder_reducer import AtLayer, DecoderReducer
from tokenprune.models import mini
from tokenprune.models.mini.boards import boards
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import (
    DART,
    FEATHER,
    DivPrune,
    FastV,
    HiRED,
    PyramidDrop,
    Random,
    SparseVLM,
    TransPrune,
    V2Drop,
    VisionDrop,
)

LAYERS, CUT = 3, 1
"""Layers of the LLM of the embedded model, and the first layer without the dropped tokens.

Behind layer 2, random tokens keep the accuracy of all tokens, so that a cut there tells no strategies apart."""
AVERAGES = (0.05, 0.1, 0.2, 0.4, 0.5)
"""Average tokens as ratios of the tokens that enter the LLM without reduction."""
CUT_BUDGET = 0.5
"""Tokens that remain behind the cut of a composition, as a ratio of the tokens that entered."""


def at_cut(kind: type[DecoderReducer], budget: float) -> DecoderReducer:
    """Return a strategy with one cut.

    Args:
        kind: the strategy; strategies with several cuts get a schedule of one cut.
        budget: tokens that remain, as a ratio of the tokens that entered.
    """
    if "schedule" in kind.__dataclass_fields__:
        return kind(schedule=((CUT, budget),))  # type: ignore[call-arg]
    return kind(layer=CUT, budget=budget)


def list_projector_strategies() -> Mapping[str, TokenReducer]:
    """Return the compared strategies before the LLM by name."""
    return {"HiRED": HiRED(), "DivPrune": DivPrune(), "Random": Random()}


def list_decoder_strategies(budget: float) -> Mapping[str, TokenReducer]:
    """Return the compared strategies inside the LLM by name.

    Args:
        budget: tokens that remain, as a ratio of the tokens that entered.
    """
    kinds = (FastV, PyramidDrop, FEATHER, SparseVLM, DART, V2Drop, TransPrune, VisionDrop)
    return {
        **{kind.__name__: at_cut(kind, budget) for kind in kinds},
        "DivPrune at the cut": AtLayer(CUT, DivPrune(budget)),
        "Random at the cut": AtLayer(CUT, Random(budget)),
    }


def list_settings(average: float) -> Mapping[str, TokenReducer]:
    """Return all strategies by name with budgets that give the same average tokens.

    Args:
        average: average tokens as a ratio of the tokens that enter the LLM without reduction.
    """
    budget = Budget(average, of="unpadded")
    settings: dict[str, TokenReducer] = {
        name: replace(reducer, budget=budget) for name, reducer in list_projector_strategies().items()
    }
    if (behind := remaining_at_cut(average)) > 0:
        settings |= list_decoder_strategies(behind)
    return {**settings, **list_compositions(average)}


def remaining_at_cut(average: float) -> float:
    """Return the ratio of tokens that a strategy inside the LLM alone keeps at the cut; negative if it cannot.

    Args:
        average: average tokens as a ratio of the tokens that enter the LLM without reduction.
    """
    return (LAYERS * average - CUT) / (LAYERS - CUT)


def entering_tokens(average: float) -> float:
    """Return the ratio of tokens that enter the LLM before a cut that keeps `CUT_BUDGET` of them.

    Args:
        average: average tokens as a ratio of the tokens that enter the LLM without reduction.
    """
    return LAYERS * average / (CUT + (LAYERS - CUT) * CUT_BUDGET)


def list_compositions(average: float) -> Mapping[str, TokenReducer]:
    """Return the compositions of HiRED and a strategy inside the LLM by name; none if more than all tokens would enter.

    Args:
        average: average tokens as a ratio of the tokens that enter the LLM without reduction.
    """
    entering = entering_tokens(average)
    if entering > 1:
        return {}
    first = HiRED(Budget(entering, of="unpadded"))
    return {f"HiRED+{name}": first >> reducer for name, reducer in list_decoder_strategies(CUT_BUDGET).items()}


def measure(
    number: int, first: int, methods: Sequence[str] | None = None
) -> tuple[dict[str, list[list[int]]], dict[str, list[float]]]:
    """Return right answers and average tokens of every setting, by ``"average name"``, for each board.

    Args:
        number: number of boards.
        first: index of the first board.
        methods: names of the settings to measure; by default all.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(mini.path())
    settings: list[tuple[str, float, TokenReducer]] = [("full", 1.0, HiRED(1.0))]
    settings += [
        (name, average, reducer)
        for average in AVERAGES
        for name, reducer in list_settings(average).items()
        if methods is None or name in methods
    ]
    right: dict[str, list[list[int]]] = {}
    tokens: dict[str, list[float]] = {}
    for board in boards(number, "heldout", first):
        for name, average, answers, run in measure_board(model, processor, board, settings):
            key = f"{average} {name}"
            right.setdefault(key, []).append([int(is_right) for is_right in answers])
            tokens.setdefault(key, []).append(run.account.average_tokens)
    return right, tokens


def format_table(right: Mapping[str, list[list[int]]], tokens: Mapping[str, list[float]]) -> str:
    """Return the Markdown table of accuracy in percent with 95 % intervals.

    Args:
        right: right answers of every setting for each board.
        tokens: average tokens of every setting for each board.
    """

    def cell(key: str) -> str:
        if key not in right:
            return ""
        rows: list[Answers] = [np.array(row) for row in right[key]]
        mean, low, high = board_interval(rows)
        return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}], {np.mean(tokens[key]):.0f}"

    names = list(dict.fromkeys(key.split(" ", 1)[1] for key in right if not key.endswith(" full")))
    boards_count, questions = len(right["1.0 full"]), sum(map(len, right["1.0 full"]))
    lines = [
        f"{boards_count} held-out boards, {questions} questions. Right answers in percent, 95 % intervals from a "
        "bootstrap over boards, and average tokens.",
        f"\nAll tokens: {cell('1.0 full')}\n",
        f"| strategy | {' | '.join(f'{average:.0%}' for average in AVERAGES)} |",
        "|---|" + "---|" * len(AVERAGES),
    ]
    lines += [f"| {name} | {' | '.join(cell(f'{average} {name}') for average in AVERAGES)} |" for name in names]
    return "\n".join(lines)


def main(number: int = 30, first: int = 1000, out: str | None = None, methods: list[str] | None = None) -> None:
    """Measure all settings on held-out boards and print the table.

    Args:
        number: number of boards; each has about 18 questions.
        first: index of the first board.
        out: JSON file for the answers to all questions. Other methods that it already holds remain in it.
        methods: names of the settings to measure; by default all.
    """
    right, tokens = measure(number, first, methods)
    if out is not None and Path(out).exists():
        earlier = json.loads(Path(out).read_text())
        right, tokens = earlier["right"] | right, earlier["average_tokens"] | tokens
    if out is not None:
        Path(out).write_text(json.dumps({"right": right, "average_tokens": tokens}))
    print(format_table(right, tokens))


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
