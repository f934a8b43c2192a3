"""Measures the accuracy of strategies on held-out boards with the embedded model, with intervals.

Run it: ``python -m research.heldout --number 125``

Every board is encoded once. All strategies and budgets share this encoding, and only the LLM runs again. Answers are
generated greedily, with all questions of a board in one batch. Questions of one board are not independent. Intervals
therefore come from a bootstrap that resamples boards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from research.mini_training.evaluate import build_inputs
from tokenprune.adapter import Encoding, find_adapter
from tokenprune.catalog import strategies
from tokenprune.component_reducer import ComponentReducer
from tokenprune.experiments.analysis.intervals import bootstrap_interval
from tokenprune.experiments.analysis.report.formatting import SAME
from tokenprune.models import mini
from tokenprune.models.mini.boards import Board, boards
from tokenprune.models.mini.pages import Page
from tokenprune.pipeline import Pipeline
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run
from tokenprune.strategies import EADP, TRIM, CDPruner, HiRED, Random
from tokenprune.strategies.cdpruner import ConditionalDiversitySelection
from tokenprune.strategies.components import (
    BaseTileAllocation,
    ContextualMerging,
    GlobalTopAllocation,
    SaliencyCoverageSelection,
    SubImagesAllocation,
    TextRelevance,
    TopRelevanceSelection,
)
from tokenprune.strategies.eadp import DenseTextRelevance, FacilityLocationSelection
from tokenprune.strategies.globalcom2 import GuidedAllocation

BUDGETS = (0.05, 0.1, 0.2, 0.4)

SettingKey: TypeAlias = tuple[str, float]
Answers: TypeAlias = NDArray[np.int64]


def list_strategies() -> dict[str, TokenReducer]:
    """Return the compared strategies by name; `list_settings` sets their budget."""
    shipped: dict[str, Any] = {n: kind for n, kind in strategies().items() if n not in ("HiRED", "Random")}
    return {
        "HiRED": HiRED(),
        "HiRED, positions preserved": HiRED(positions="preserve"),
        "HiRED.paper": HiRED.paper(),
        "HiRED.release": HiRED.release(),
        "TopAttentionSelection, one pool": HiRED(allocation=GlobalTopAllocation()),
        "TopAttentionSelection, sub-images only": HiRED(allocation=SubImagesAllocation(pooled=True)),
        "TopAttentionSelection, base tile only": HiRED(allocation=BaseTileAllocation()),
        **{name: kind(text_model="mini" if kind().reads_question else None) for name, kind in shipped.items()},
        **{f"{type(reducer).__name__}, sign of this text tower": reducer for reducer in make_text_guided()},
        "GlobalCom2's tiles, SCOPE's tokens, VisionZip's merging": ComponentReducer(
            allocation=GuidedAllocation(), selection=SaliencyCoverageSelection(), merging=ContextualMerging()
        ),
        **{f"Random, seed {seed}": Random.seeded(seed=seed) for seed in range(3)},
    }


def make_text_guided() -> tuple[CDPruner, EADP, TRIM]:
    """Return the strategies that compare tokens with the question, with the sign for the embedded text tower.

    In OpenAI's CLIP, patches that show a text have a lower similarity to it than other patches. The published methods
    therefore use the negative similarity. The embedded tower is trained with the opposite sign, so the similarity
    itself is used here.
    """
    cosine, dot = TextRelevance(sign="aligned"), TextRelevance(likeness="dot", sign="aligned")
    return (
        CDPruner(selection=ConditionalDiversitySelection(cosine), text_model="mini"),
        EADP(selection=FacilityLocationSelection(DenseTextRelevance(sign="aligned")), text_model="mini"),
        TRIM(selection=TopRelevanceSelection(dot), text_model="mini"),
    )


def list_settings(
    reducers: Mapping[str, TokenReducer], budgets: Sequence[float]
) -> list[tuple[str, float, TokenReducer]]:
    """Return all compared settings as (name, budget, strategy), full tokens first."""
    settings = [(n, budget, replace(reducer, budget=budget)) for budget in budgets for n, reducer in reducers.items()]
    return [("full", 1.0, HiRED(1.0)), *settings]


def answer_from_encoding(
    model: Any, processor: Any, encoding: Encoding, inputs: Mapping[str, Any], reducer: TokenReducer
) -> tuple[list[str], Run]:
    """Answer several questions about one encoded image, and return the answers and the run.

    Args:
        model: the model.
        processor: the processor of the model.
        encoding: encoding of the image, with the signals that the strategy requires.
        inputs: text inputs of one prompt per question, `[questions, length]`.
        reducer: the strategy.
    """
    pipeline, ids = Pipeline(reducer, find_adapter(model), tokenizer=processor), inputs["input_ids"]
    call = pipeline.prepare(inputs, for_generate=True, encoding=encoding.repeat(len(ids)))
    out = pipeline.generate_prepared(call, ids, max_new_tokens=4, do_sample=False)
    texts = processor.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts], pipeline.run


def measure_board(
    model: Any,
    processor: Any,
    board: Board | Page,
    settings: Sequence[tuple[str, float, TokenReducer]],
    text_model: str = "mini",
) -> Iterator[tuple[str, float, list[bool], Run]]:
    """Yield (name, budget, whether each answer is correct, run) of every setting for one board or page."""
    questions = [question.text for question in board.questions]
    image_inputs, inputs = (
        build_inputs(processor, board.image, questions[:1]),
        build_inputs(processor, board.image, questions),
    )
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    adapter = find_adapter(model)
    needs = [signal for _, _, reducer in settings for signal in Pipeline(reducer, adapter).needs]
    with torch.no_grad():
        encoding = adapter.encode(image_inputs, needs, text_model=text_model)
        for name, budget, reducer in settings:
            texts, run = answer_from_encoding(model, processor, encoding, text, reducer)
            expected = [question.answer for question in board.questions]
            right = ["".join(text.split()) == answer for text, answer in zip(texts, expected, strict=True)]
            yield name, budget, right, run


def board_interval(right: Sequence[Answers], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Return the mean over questions and the ends of its 95 % interval from a bootstrap over boards.

    Args:
        right: per board, 1 (correct) or 0 for each question, or differences of such values.
        seed: seed of the bootstrap.
        draws: number of bootstrap samples.
    """
    groups = [f"{number:09}" for number, board in enumerate(right) for _ in board]
    interval = bootstrap_interval(np.concatenate(right), groups, seed, draws)
    return interval.mean, interval.low, interval.high


def format_difference(difference: Sequence[Answers]) -> str:
    """Return a paired difference in points with its interval and the conclusion, as text.

    Args:
        difference: per board, the difference of two values 1 or 0 for each question.
    """
    mean, low, high = board_interval(difference)
    conclusion = "difference seen" if low > 0 or high < 0 else "no difference seen"
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], {conclusion}"


@dataclass
class BoardResults:
    """Results of all settings, board by board.

    Args:
        kinds: for each question of each board, its type and the tiles that its answer requires.
        right: for each setting (name, budget), 1 (correct) or 0 per question of each board.
        tokens: for each setting, asked and kept tokens of each board.
    """

    kinds: list[list[tuple[str, str]]] = field(default_factory=list)
    right: dict[SettingKey, list[list[int]]] = field(default_factory=dict)
    tokens: dict[SettingKey, list[tuple[int, int]]] = field(default_factory=dict)

    def __add__(self, other: BoardResults) -> BoardResults:
        """Return the results of two sets of boards together; both must hold the same settings."""
        return BoardResults(
            self.kinds + other.kinds,
            {key: rows + other.right[key] for key, rows in self.right.items()},
            {key: rows + other.tokens[key] for key, rows in self.tokens.items()},
        )

    def save(self, path: Path) -> None:
        """Write the results to a JSON file."""
        settings = [[*key, self.right[key], self.tokens[key]] for key in self.right]
        path.write_text(json.dumps({"kinds": self.kinds, "settings": settings}))

    @classmethod
    def load(cls, path: Path) -> BoardResults:
        """Return the results of a JSON file of `save`."""
        content = json.loads(path.read_text())
        results = cls([[(kind, needs) for kind, needs in board] for board in content["kinds"]])
        for name, budget, right, tokens in content["settings"]:
            results.right[name, budget] = right
            results.tokens[name, budget] = [(asked, kept) for asked, kept in tokens]
        return results

    def answers_of(self, key: SettingKey, kind: tuple[str, str] | None = None) -> list[Answers]:
        """Return 1 (correct) or 0 per question of each board for a setting, for one kind of question or for all."""
        rows = zip(self.right[key], self.kinds, strict=True)
        return [np.array([r for r, k in zip(row, ks, strict=True) if kind in (None, k)]) for row, ks in rows]


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study of deviations on held-out boards.

    Args:
        number: number of held-out boards.
        first: index of the first board.
        budgets: budgets as ratios.
        methods: names of methods; by default all methods.
    """

    number: int = 125
    first: int = 1000
    budgets: tuple[float, ...] = (0.05, 0.1, 0.2)
    methods: tuple[str, ...] | None = None


def measure_strategies(
    first: int, number: int, budgets: Sequence[float], reducers: Mapping[str, TokenReducer] | None = None
) -> BoardResults:
    """Return the results of strategies on held-out boards.

    Args:
        first: index of the first board.
        number: number of boards.
        budgets: budgets as ratios.
        reducers: strategies by name; by default all of `list_strategies`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(mini.path())
    results, settings = BoardResults(), list_settings(list_strategies() if reducers is None else reducers, budgets)
    for board in boards(number, "heldout", first):
        results.kinds.append([(question.type, question.needs) for question in board.questions])
        for name, budget, right, run in measure_board(model, processor, board, settings):
            image = run.account.images[0]
            results.right.setdefault((name, budget), []).append([int(is_right) for is_right in right])
            results.tokens.setdefault((name, budget), []).append((image.asked, image.kept))
    return results


def format_report(results: BoardResults) -> str:
    """Return the Markdown tables of accuracy, paired differences, question types and kept tokens."""

    def cell(rows: Sequence[Answers], sign: str = "") -> str:
        mean, low, high = board_interval(rows)
        return f"{100 * mean:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"

    full, budgets = ("full", 1.0), sorted({budget for name, budget in results.right if name != "full"})
    names = list(dict.fromkeys(name for name, _ in results.right if name != "full"))
    head = f"| {' | '.join(f'{budget:.0%}' for budget in budgets)} |\n|---|" + "---|" * len(budgets)
    questions = sum(map(len, results.kinds))
    lines = [
        f"{len(results.kinds)} held-out boards, {questions} questions. Right answers in percent, 95 % intervals from a "
        "bootstrap over boards.",
        f"\nFull tokens: {cell(results.answers_of(full))}\n",
        f"| strategy {head}",
    ]
    lines += [f"| {n} | {' | '.join(cell(results.answers_of((n, b))) for b in budgets)} |" for n in names]
    lines += [f"\nHiRED minus others, paired, in points ({SAME}: the interval contains zero, no difference seen):\n"]
    lines += [f"| HiRED minus {head}"]
    for name in ["full", *(name for name in names if name != "HiRED")]:
        cells = []
        for budget in budgets:
            subtrahend = results.answers_of(full if name == "full" else (name, budget))
            rows = [a - b for a, b in zip(results.answers_of(("HiRED", budget)), subtrahend, strict=True)]
            _, low, high = board_interval(rows)
            cells.append(cell(rows, "+") + (f" {SAME}" if low <= 0 <= high else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "\nBy type of question, full tokens and HiRED:\n",
        f"| type | answer stands in | n | full {head}---|---|---|",
    ]
    for kind in sorted({pair for board in results.kinds for pair in board}):
        keys = [full, *(("HiRED", budget) for budget in budgets)]
        rows = [np.concatenate(results.answers_of(key, kind)) for key in keys]
        shares = " | ".join(f"{100 * row.mean():.1f}" for row in rows)
        lines.append(f"| {kind[0]} | {kind[1]} | {len(rows[0])} | {shares} |")
    lines += ["\nTokens kept of 100 asked, mean over boards:\n", f"| strategy {head}"]
    for name in names:
        totals = [np.array(results.tokens[name, budget]).sum(axis=0) for budget in budgets]
        lines.append(f"| {name} | {' | '.join(f'{100 * kept / asked:.1f}' for asked, kept in totals)} |")
    return "\n".join(lines)


def main(
    number: int = 125,
    first: int = 1000,
    budgets: list[float] | None = None,
    out: str | None = None,
    merge: list[str] | None = None,
) -> None:
    """Measure all strategies on held-out boards and print the tables.

    Args:
        number: number of boards; each has about 18 questions.
        first: index of the first board. Boards 0 to 71 were used to choose the training schedule.
        budgets: budgets as ratios; by default 5, 10, 20 and 40 %.
        out: JSON file for the results of all questions.
        merge: JSON files of earlier runs. If given, nothing is measured and their results are reported together.
    """
    if merge:
        results = sum((BoardResults.load(Path(path)) for path in merge[1:]), BoardResults.load(Path(merge[0])))
    else:
        results = measure_strategies(first, number, tuple(budgets or BUDGETS))
    if out is not None:
        results.save(Path(out))
    print(format_report(results))


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
