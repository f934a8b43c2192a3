"""Measures the effect of each deviation between a paper, its code and the repaired method, on held-out boards.

Run it: ``python -m research.errata``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from research.heldout import BoardResults, StudyOptions, format_difference, make_text_guided, measure_strategies
from tokenprune.adapter import find_adapter
from tokenprune.capabilities import ReadsQuestion, require_capability
from tokenprune.image import TEXT_SIGNALS, EncodedImage, Signal
from tokenprune.models import mini
from tokenprune.models.mini.boards import boards
from tokenprune.policies import compute_relevance
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import (
    EADP,
    HERO,
    SCOPE,
    TOPS,
    VTCCLS,
    DivPrune,
    FasterVLM,
    GlobalCom2,
    HiPrune,
    HiRED,
    HoloV,
    PruMerge,
    PruMergePlus,
    VisionZip,
    VisPruner,
)
from tokenprune.strategies.cdpruner import ConditionalDiversitySelection
from tokenprune.strategies.components import (
    AnchorBufferRegisterSelection,
    ContextualMerging,
    MergedLastOrder,
    NeighborMerging,
    ScoreMassAllocation,
    ScoreOrder,
    TextRelevance,
    TopAttentionSelection,
    TopRelevanceSelection,
    UniformAllocation,
    VisualContentAllocation,
)
from tokenprune.strategies.eadp import DenseTextRelevance, FacilityLocationSelection
from tokenprune.strategies.globalcom2 import GuidedAllocation
from tokenprune.strategies.hero import SaliencyRelevanceAllocation
from tokenprune.strategies.tops import OptimalPreservationSelection

LOW, HIGH = -0.545, 0.564
"""Range of the relevance of all patches to the questions of boards 1000 to 1124, with the embedded text tower."""
StrategyOrFactory: TypeAlias = TokenReducer | Callable[[float], TokenReducer]
"""A strategy whose budget is replaced, or a function that returns a strategy for a budget."""


@dataclass(frozen=True)
class Deviation:
    """One deviation of a method from its repaired form.

    Args:
        description: short text of the deviation.
        repaired: the strategy without the deviation.
        deviating: returns the strategy with the deviation for a budget.
    """

    description: str
    repaired: TokenReducer
    deviating: Callable[[float], TokenReducer]

    @property
    def method(self) -> str:
        """Name of the method."""
        return type(self.repaired).__name__


@dataclass
class BatchRangeSelection(ConditionalDiversitySelection):
    """CDPruner's selection in a batch of many images: relevance is scaled to the range of all images of the batch.

    Args:
        low: smallest relevance in the batch; by default of the questions of boards 1000 to 1124.
        high: largest relevance in the batch.
    """

    low: float = LOW
    high: float = HIGH

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, scaled to the range of the batch, `[tiles, tokens]`."""
        relevance = compute_relevance(self.relevance, image)
        low = relevance.min().clamp(max=self.low)
        return (relevance - low + 1e-6) / (relevance.max().clamp(min=self.high) - low)


def list_deviations() -> list[Deviation]:
    """Return all measured deviations, grouped by method."""

    def deviations_of(repaired: TokenReducer, variants: Mapping[str, StrategyOrFactory]) -> list[Deviation]:
        def to_factory(variant: StrategyOrFactory) -> Callable[[float], TokenReducer]:
            return (lambda budget: replace(variant, budget=budget)) if isinstance(variant, TokenReducer) else variant

        return [Deviation(description, repaired, to_factory(variant)) for description, variant in variants.items()]

    content = VisualContentAllocation
    cdpruner, eadp, trim = make_text_guided()
    contextual = ContextualMerging(combine="sum", spacing="step", cls=True)
    order = VisionZip.release().order
    cosine = TextRelevance(sign="aligned")
    uniform = UniformAllocation(rounding="floor")
    positions = DenseTextRelevance(word_share=0.2, text="positions", sign="aligned")
    released = replace(positions, weight_temperature=0.01 + 1e-6, among="all")
    few_words, squared = DenseTextRelevance(word_share=0.2, sign="aligned"), DenseTextRelevance(power=2, sign="aligned")
    return [
        *deviations_of(
            HiRED(),
            {
                "stripes instead of true regions": HiRED(allocation=content(region="stripe")),
                "even quadrants instead of true regions": HiRED(allocation=content(region="quadrant")),
                "count of top tokens instead of attention mass": HiRED(allocation=content(statistic="top_count")),
                "rounding down instead of largest remainder": HiRED(allocation=content(rounding="floor")),
                "padding paid for instead of excluded": HiRED(padding="ignore"),
                "newlines dropped instead of kept with their rows": HiRED(newlines="drop"),
                "the release": HiRED.release(),
            },
        ),
        *deviations_of(FasterVLM(), {"the release": FasterVLM.release()}),
        *deviations_of(
            GlobalCom2(),
            {
                "quadrants instead of true regions": GlobalCom2(allocation=GuidedAllocation(region="quadrant")),
                "base tile in the order of its scores": GlobalCom2(order=ScoreOrder(tiles="base")),
                "the release": lambda budget: GlobalCom2.release(budget),
            },
        ),
        *deviations_of(
            HiPrune(),
            {
                "neighbours run over the ends of rows": HiPrune(selection=AnchorBufferRegisterSelection(wrap=True)),
                "newlines dropped": HiPrune(newlines="drop"),
                "rounding down, padding paid for": HiPrune(allocation=uniform, padding="ignore"),
            },
        ),
        *deviations_of(HoloV(), {"the release": HoloV.release()}),
        *deviations_of(SCOPE(), {"the release": SCOPE.release()}),
        *deviations_of(VisPruner(), {"the release": VisPruner.release()}),
        *deviations_of(
            DivPrune(), {"newlines compete, nearest rounding (the release)": lambda budget: DivPrune.release(budget)}
        ),
        *deviations_of(
            PruMerge(),
            {
                "sums instead of means": PruMerge(merging=NeighborMerging(weights="release")),
                "order of attention": PruMerge(order=ScoreOrder()),
                "the release, which sets its own count": PruMerge.release(),
            },
        ),
        *deviations_of(
            PruMergePlus(),
            {
                "sums instead of means": PruMergePlus(merging=NeighborMerging(weights="release")),
                "the release, which sets its own count": PruMergePlus.release(),
            },
        ),
        *deviations_of(
            VisionZip(),
            {
                "sums instead of means": VisionZip(merging=ContextualMerging(combine="sum")),
                "targets by whole steps from the first on": VisionZip(merging=ContextualMerging(spacing="step")),
                "CLS as one of the tokens": VisionZip(merging=ContextualMerging(cls=True)),
                "all three, in the order of the release": VisionZip(merging=contextual, order=order),
            },
        ),
        *deviations_of(
            trim,
            {
                "merged token after the others": replace(trim, order=MergedLastOrder()),
                "cosines instead of dot products": replace(trim, selection=TopRelevanceSelection(cosine)),
            },
        ),
        *deviations_of(
            VTCCLS(),
            {"the last 30 % of the layers instead of three": VTCCLS(selection=TopAttentionSelection(layer=[-3, -2]))},
        ),
        *deviations_of(
            HERO(text_model="mini"),
            {
                "rounding down": lambda b: HERO(
                    b, text_model="mini", allocation=SaliencyRelevanceAllocation(retention=b)
                ),
                "the release": lambda budget: HERO.release(budget, text_model="mini"),
            },
        ),
        *deviations_of(
            cdpruner,
            {
                "padding paid for, newlines dropped": replace(cdpruner, padding="ignore", newlines="drop"),
                "stretched over a large batch": replace(cdpruner, selection=BatchRangeSelection(cosine)),
            },
        ),
        *deviations_of(
            TOPS(), {"division by the mean": TOPS(selection=OptimalPreservationSelection(rescaling="mean"))}
        ),
        *deviations_of(
            eadp,
            {
                "a fifth of the words instead of half": replace(eadp, selection=FacilityLocationSelection(few_words)),
                "squared importance": replace(eadp, selection=FacilityLocationSelection(squared)),
                "all text positions": replace(eadp, selection=FacilityLocationSelection(positions)),
                "rounding down": replace(eadp, allocation=ScoreMassAllocation(rounding="floor")),
                "the release": lambda b: replace(
                    EADP.release(b, "mini"), selection=FacilityLocationSelection(released)
                ),
            },
        ),
    ]


def count_moved(deviations: list[Deviation], first: int, number: int, budget: float) -> dict[str, tuple[float, float]]:
    """Return two shares for each deviation: tokens of the repaired form that it drops, and budget that it loses.

    Strategies that read the question get the first question of each board.

    Args:
        deviations: the deviations.
        first: index of the first board.
        number: number of boards.
        budget: budget as a ratio.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()
    processor, adapter = AutoProcessor.from_pretrained(mini.path()), find_adapter(model)
    needs: list[Signal] = [
        signal
        for deviation in deviations
        for reducer in (deviation.repaired, deviation.deviating(budget))
        for signal in reducer.needs
    ]
    counts: dict[str, list[tuple[int, int, int, int]]] = {}
    for board in boards(number, "heldout", first):
        inputs = processor(images=[board.image], text=["<image>"], return_tensors="pt")
        with torch.no_grad():
            image = adapter.encode(inputs, needs, text_model="mini").images[0]
        question = require_capability(adapter, ReadsQuestion).embed_question(board.questions[0].text, "mini")
        text = {(kind, image.feature_layer): question[kind] for kind in TEXT_SIGNALS}
        image = replace(image, signals={**image.signals, **text})
        for deviation in deviations:
            repaired = replace(deviation.repaired, budget=budget).reduce(image)
            deviating = deviation.deviating(budget).reduce(image)
            lost = int((repaired.kept & ~deviating.kept).sum())
            rows = counts.setdefault(_setting_name(deviation), [])
            kept = repaired.kept_tokens
            rows.append((lost, kept, kept - deviating.kept_tokens, kept))
    totals = {name: np.array(rows).sum(axis=0) for name, rows in counts.items()}
    return {name: (lost / kept, missing / asked) for name, (lost, kept, missing, asked) in totals.items()}


def _setting_name(deviation: Deviation) -> str:
    return f"{deviation.method}: {deviation.description}"


def list_strategies(deviations: list[Deviation], budget: float) -> Mapping[str, TokenReducer]:
    """Return the strategies to compare by name; a repaired strategy has the name of its method."""
    repaired = {deviation.method: deviation.repaired for deviation in deviations}
    return {**repaired, **{_setting_name(deviation): deviation.deviating(budget) for deviation in deviations}}


def format_report(
    deviations: list[Deviation], results: BoardResults, shares: dict[str, tuple[float, float]], budget: float
) -> str:
    """Return the Markdown table of one budget."""
    lines = [f"| at {budget:.0%} | tokens moved | budget lost | accuracy minus repaired, points |\n|---|---|---|---|"]
    for deviation in deviations:
        name = _setting_name(deviation)
        pairs = zip(results.answers_of((name, budget)), results.answers_of((deviation.method, budget)), strict=True)
        points = format_difference([a - b for a, b in pairs])
        lines.append(f"| {name} | {shares[name][0]:.1%} | {shares[name][1]:.1%} | {points} |")
    return "\n".join(lines)


def main(options: StudyOptions) -> None:
    """Measure the deviations and print one table per budget."""
    deviations = [
        deviation for deviation in list_deviations() if options.methods is None or deviation.method in options.methods
    ]
    for budget in options.budgets:
        results = measure_strategies(options.first, options.number, [budget], list_strategies(deviations, budget))
        print(f"{options.number} boards, {sum(map(len, results.kinds))} questions\n")
        moved = count_moved(deviations, options.first, options.number, budget)
        print(format_report(deviations, results, moved, budget) + "\n", flush=True)


if __name__ == "__main__":
    import jsonargparse

    main(jsonargparse.auto_cli(StudyOptions, as_positional=False))
