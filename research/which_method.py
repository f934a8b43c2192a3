"""Compares the strategies of all stages at equal average tokens, on boards and pages, with the embedded model.

Run it: ``python -m research.which_method --world pages --number 100``

*Average tokens* are the visual tokens of a prompt in one layer of the LLM, averaged over the layers, see
`research.equal_compute`. Each image is encoded once, except for strategies inside the vision tower. Answers are greedy.
Questions about one image are not independent, so intervals come from a bootstrap over images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from research.equal_compute import (
    CUT_BUDGET,
    entering_tokens,
    list_compositions,
    list_decoder_strategies,
    remaining_at_cut,
)
from research.heldout import Answers, board_interval, measure_board
from research.mini_training.evaluate import WORLDS
from research.tried_selections import MODEL, list_candidates
from research.world_results import WorldResults
from tokenprune.budget import Budget
from tokenprune.catalog import strategies
from tokenprune.experiments.analysis.report.formatting import SAME
from tokenprune.experiments.evaluation.evidence import evidence_coverage
from tokenprune.experiments.evaluation.tasks.base import to_regions
from tokenprune.experiments.evaluation.tasks.pages import name_split as name_page_split
from tokenprune.models import mini
from tokenprune.models.mini.boards import Split
from tokenprune.models.mini.pages import Page
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import TOPS, CDPruner, DivPrune, HiRED, ImageDownsample, QuestionFirst, Random
from tokenprune.strategies.encoder import IPCV, EViT, PiToMe, RandomPatches, ToMe

FULL = "all tokens"
AVERAGES = (0.05, 0.1, 0.2, 0.4)
"""Average tokens as ratios of the tokens that enter the LLM without reduction."""


def list_projector_strategies() -> dict[str, TokenReducer]:
    """Return the strategies before the LLM by name."""
    kinds = {name: kind for name, kind in strategies().items() if kind.stage.name == "projector" and name != "Random"}
    reducers: dict[str, TokenReducer] = {
        name: kind(text_model=MODEL if kind().reads_question else None) for name, kind in kinds.items()
    }
    return reducers | {f"Random, seed {seed}": Random.seeded(seed=seed) for seed in range(3)}


def list_encoder_strategies(average: float) -> dict[str, TokenReducer]:
    """Return the strategies inside the vision tower by name, alone and in compositions with HiRED.

    Alone, the patches that leave the tower are the tokens. IPCV restores all patches, and has compositions only. A
    layer merges at most half of its patches. Merging alone therefore cannot reach 10 %, and is listed from 20 % on. In
    a composition the strategy has its default schedule (merging: 12 patches per layer), and HiRED the budget.

    Args:
        average: tokens that enter the LLM as a ratio of the tokens without reduction.
    """
    steps = tuple((depth, average ** (number / 3)) for number, depth in enumerate((0.25, 0.5, 0.75), start=1))
    alone: dict[str, TokenReducer] = {"EViT": EViT(schedule=steps), "RandomPatches": RandomPatches(average)}
    if average >= 0.2:
        alone |= {"ToMe": ToMe(average), "PiToMe": PiToMe(average)}
    towers = {"ToMe": ToMe(r=12), "PiToMe": PiToMe(r=12), "IPCV": IPCV(), "RandomPatches": RandomPatches(0.5)}
    if average < EViT().schedule[-1][1]:
        towers["EViT"] = EViT()
    hired = HiRED(Budget(average, of="unpadded"))
    return alone | {f"{name}+HiRED": tower >> hired for name, tower in towers.items()}


def list_two_stages(average: float) -> dict[str, TokenReducer]:
    """Return compositions that drop few tokens before the LLM and more at an early layer, by name.

    Args:
        average: average tokens as a ratio of the tokens that enter the LLM without reduction.
    """
    entering = Budget(entering_tokens(average), of="unpadded")
    inside = list_decoder_strategies(CUT_BUDGET)
    names = ("TransPrune", "PyramidDrop", "FEATHER", "DivPrune at the cut", "Random at the cut")
    return {
        "QuestionFirst": QuestionFirst(Budget(average, of="unpadded"), text_model=MODEL),
        **{f"QuestionFirst+{name}": QuestionFirst(entering, text_model=MODEL) >> inside[name] for name in names},
        **{f"{kind.__name__}+TransPrune": kind(entering) >> inside["TransPrune"] for kind in (HiRED, DivPrune, TOPS)},
        "CDPruner+TransPrune": CDPruner(entering, text_model=MODEL) >> inside["TransPrune"],
    }


def list_settings(average: float, more: Mapping[str, TokenReducer] | None = None) -> dict[str, TokenReducer]:
    """Return all strategies by name with budgets that give the same average tokens.

    Strategies inside the LLM alone are possible above a third of the tokens, compositions with them are measured below.

    Args:
        average: average tokens as a ratio of the tokens that enter the LLM without reduction.
        more: further strategies before the LLM.
    """
    budget = Budget(average, of="unpadded")
    before = list_projector_strategies() | dict(more or {})
    settings = {name: replace(reducer, budget=budget) for name, reducer in before.items()}
    settings |= {"ImageDownsample": ImageDownsample(budget), **list_encoder_strategies(average)}
    if (behind := remaining_at_cut(average)) > 0:
        return {**settings, **list_decoder_strategies(behind)}
    return {**settings, **list_compositions(average)}


def choose_settings(averages: Sequence[float], methods: Sequence[str] | None = None) -> dict[str, TokenReducer]:
    """Return the settings of a run by average and name.

    Args:
        averages: average tokens as ratios.
        methods: names of strategies, also of `list_two_stages`; by default all strategies of `list_settings`.

    Raises:
        ValueError: if there is no strategy of a name.
    """
    tables = {average: list_settings(average, list_candidates()) for average in averages}
    if methods is not None:
        tables = {average: settings | list_two_stages(average) for average, settings in tables.items()}
        names = dict.fromkeys(name for settings in tables.values() for name in settings)
        if unknown := next((name for name in methods if name not in names), None):
            raise ValueError(f"there is no strategy {unknown!r}; the names are {', '.join(names)}")
    return {
        f"{average} {name}": reducer
        for average, settings in tables.items()
        for name, reducer in settings.items()
        if methods is None or name in methods
    }


def name_split(image: Any, question: Any) -> str:
    """Return the difficulty of a question: for boards, the tiles that show the answer, see `Question` of the world."""
    return name_page_split(image, question) if isinstance(image, Page) else question.needs


def find_evidence(image: Any, question: Any) -> Sequence[tuple[int, int, int, int]]:
    """Return the boxes in pixels that show the answer of a question."""
    if isinstance(image, Page):
        return question.evidence
    return [image.items[number].box for number in question.about]


def measure_world(
    world: str,
    settings: Mapping[str, TokenReducer],
    number: int,
    first: int,
    split: Split = "heldout",
    out: str | Path | None = None,
) -> WorldResults:
    """Return the results of settings on the images of a world.

    Args:
        world: ``boards`` or ``pages``.
        settings: strategies with their budgets by name.
        number: number of images.
        first: index of the first image.
        split: ``heldout``, or ``train`` for images that may be used to choose a strategy.
        out: JSON file that is written after each image; images that it contains are not measured again.

    Raises:
        ValueError: if the file contains results of other settings or images.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(mini.path(MODEL), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(mini.path(MODEL))
    rows = [(FULL, 1.0, HiRED(1.0)), *((name, 0.0, reducer) for name, reducer in settings.items())]
    results = WorldResults.load(out) if out is not None and Path(out).exists() else WorldResults()
    names = [f"{world} {split} {index}" for index in range(first, first + number)]
    count = len(results.images)
    if count and (set(results.right) != {FULL, *settings} or results.images != names[:count]):
        raise ValueError(f"{out} contains the results of other settings or images; name another file")
    image: Any
    for name, image in zip(names[count:], WORLDS[world](number - count, split, first + count), strict=True):
        results.images.append(name)
        results.questions.append([(q.type, name_split(image, q)) for q in image.questions])
        boxes = [find_evidence(image, question) for question in image.questions]
        evidence = [(to_regions(b, image.pixels.shape), q.needs) for b, q in zip(boxes, image.questions, strict=True)]
        for setting, _, right, run in measure_board(model, processor, image, rows, MODEL):
            cover = partial(evidence_coverage, run.selections[0].geometry, run.selections[0].kept)
            shares = [round(cover(regions, tiles), 3) if regions else 1.0 for regions, tiles in evidence]
            results.right.setdefault(setting, []).append([int(is_right) for is_right in right])
            results.coverage.setdefault(setting, []).append(shares)
            results.tokens.setdefault(setting, []).append(run.account.average_tokens)
        if out is not None:
            results.save(out)
    return results


def format_report(results: WorldResults, subject: str = "HiRED") -> str:
    """Return the Markdown tables of accuracy, paired differences, coverage and question types.

    Args:
        results: the results; settings are named ``"average name"``.
        subject: the strategy that is compared with all others.
    """

    def cell(rows: Sequence[Answers], sign: str = "") -> str:
        mean, low, high = board_interval(rows)
        mark = f" {SAME}" if sign and low <= 0 <= high else ""
        return f"{100 * mean:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]{mark}"

    keys = [key for key in results.right if key != FULL]
    names = list(dict.fromkeys(key.split(" ", 1)[1] for key in keys))
    averages = sorted({key.split(" ", 1)[0] for key in keys}, key=float)
    head = f"| {' | '.join(f'{float(average):.0%}' for average in averages)} |\n|---|{'---|' * len(averages)}"

    def row(name: str, make: Callable[[str], str]) -> str:
        cells = (make(f"{average} {name}") if f"{average} {name}" in results.right else "" for average in averages)
        return f"| {name} | {' | '.join(cells)} |"

    def difference(key: str) -> str:
        mine, other = results.answers_of(f"{key.split(' ', 1)[0]} {subject}"), results.answers_of(key)
        return cell([a - b for a, b in zip(mine, other, strict=True)], "+")

    def coverage_cell(key: str) -> str:
        return f"{100 * np.mean(np.concatenate(results.coverage[key])):.1f}" if key in results.coverage else ""

    count = sum(map(len, results.questions))
    lines = [
        f"{len(results.questions)} images, {count} questions. Right answers in percent, 95 % intervals from a "
        f"bootstrap over images.\n\nAll tokens: {cell(results.answers_of(FULL))}\n",
        f"| strategy {head}",
        *(row(name, lambda key: cell(results.answers_of(key))) for name in names),
    ]
    if subject in names:
        lines.append(f"\n{subject} minus others, paired, in points ({SAME}: no difference seen):\n")
        lines.append(f"| {subject} minus {head}")
        lines += [row(name, difference) for name in names if name != subject]
    if results.coverage:
        lines.append(f"\nCoverage of the evidence by the tokens that enter the LLM, in percent:\n\n| strategy {head}")
        lines += [row(n, coverage_cell) for n in names if any(f"{a} {n}" in results.coverage for a in averages)]
    kinds = sorted({label for image in results.questions for question in image for label in question})
    for average in averages:
        lines.append(f"\nBy type and split at {float(average):.0%}:\n\n| strategy | {' | '.join(kinds)} |")
        lines.append("|---|" + "---|" * len(kinds))
        for name in (FULL, *names):
            key = FULL if name == FULL else f"{average} {name}"
            if key in results.right:
                shares = (np.concatenate(results.answers_of(key, kind)).mean() for kind in kinds)
                lines.append(f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in shares)} |")
    return "\n".join(lines)


def main(
    world: str = "pages",
    number: int = 100,
    first: int = 1000,
    averages: list[float] | None = None,
    methods: list[str] | None = None,
    subject: str = "HiRED",
    out: str | None = None,
    merge: list[str] | None = None,
) -> None:
    """Measure all strategies on held-out images of a world and print the tables.

    Args:
        world: ``boards`` or ``pages``.
        number: number of images; each has about 20 questions.
        first: index of the first image.
        averages: average tokens as ratios; by default 5, 10, 20 and 40 %.
        methods: names of the strategies to measure; by default all.
        subject: the strategy that is compared with all others.
        out: JSON file for the results of all questions, written after each image; the same command resumes.
        merge: JSON files of earlier runs, on other images or with other methods. If given, nothing is measured and
            their results are reported together.
    """
    if merge:
        results = reduce(WorldResults.combine, map(WorldResults.load, merge))
    else:
        results = measure_world(world, choose_settings(averages or AVERAGES, methods), number, first, out=out)
    if merge and out is not None:
        results.save(out)
    print(format_report(results, subject))


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
