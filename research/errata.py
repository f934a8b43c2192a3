"""How much each deviation between a paper, its code and the repaired form matters, one at a time, on held-out boards.

Run it: ``python -m research.errata``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from research.heldout import Results, in_points, measure, text_guided
from tokenprune.adapter import find_adapter
from tokenprune.image import TEXT_SIGNALS, EncodedImage, Signal
from tokenprune.models import mini
from tokenprune.models.mini.boards import boards
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
"""Range of the relevance of all patches to the questions of boards 1000 to 1124, in the embedded text tower."""
Way: TypeAlias = TokenReducer | Callable[[float], TokenReducer]
"""A strategy whose budget is set later, or how to make one for a budget."""


@dataclass(frozen=True)
class Deviation:
    """One way in which a method is not as its repaired form has it.

    Args:
        what: the deviation in words.
        repaired: the strategy that it is compared with.
        deviating: the strategy at a budget.
    """

    what: str
    repaired: TokenReducer
    deviating: Callable[[float], TokenReducer]

    @property
    def method(self) -> str:
        """The name of the method."""
        return type(self.repaired).__name__


@dataclass
class StretchedOverBatch(ConditionalDiversitySelection):
    """CDPruner as in a batch of many images: relevance is stretched over the range that all of them cover together.

    Args:
        low: smallest relevance in the batch; by default over the questions of boards 1000 to 1124.
        high: largest relevance in the batch.
    """

    low: float = LOW
    high: float = HIGH

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, stretched over the batch, `[tiles, tokens]`."""
        relevance = self.relevance.relevance(image)
        low = relevance.min().clamp(max=self.low)
        return (relevance - low + 1e-6) / (relevance.max().clamp(min=self.high) - low)


def deviations() -> list[Deviation]:
    """Return every deviation that can be measured, method by method."""

    def of(repaired: TokenReducer, ways: Mapping[str, Way]) -> list[Deviation]:
        def at(way: Way) -> Callable[[float], TokenReducer]:
            return (lambda budget: replace(way, budget=budget)) if isinstance(way, TokenReducer) else way

        return [Deviation(what, repaired, at(way)) for what, way in ways.items()]

    content = VisualContentAllocation
    cdpruner, eadp, trim = text_guided()
    contextual = ContextualMerging(combine="sum", spacing="step", cls=True)
    order = VisionZip.release().order
    whole = TextRelevance(sign="aligned")
    even = UniformAllocation(rounding="floor")
    positions = DenseTextRelevance(words=0.2, text="positions", sign="aligned")
    released = replace(positions, sharpness=0.01 + 1e-6, among="all")
    few_words, squared = DenseTextRelevance(words=0.2, sign="aligned"), DenseTextRelevance(power=2, sign="aligned")
    return [
        *of(
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
        *of(FasterVLM(), {"the release": FasterVLM.release()}),
        *of(
            GlobalCom2(),
            {
                "quadrants instead of true regions": GlobalCom2(allocation=GuidedAllocation(region="quadrant")),
                "base tile in the order of its scores": GlobalCom2(order=ScoreOrder(tiles="base")),
                "the release": lambda budget: GlobalCom2.release(budget),
            },
        ),
        *of(
            HiPrune(),
            {
                "neighbours run over the ends of rows": HiPrune(selection=AnchorBufferRegisterSelection(wrap=True)),
                "newlines dropped": HiPrune(newlines="drop"),
                "rounding down, padding paid for": HiPrune(allocation=even, padding="ignore"),
            },
        ),
        *of(HoloV(), {"the release": HoloV.release()}),
        *of(SCOPE(), {"the release": SCOPE.release()}),
        *of(VisPruner(), {"the release": VisPruner.release()}),
        *of(DivPrune(), {"newlines compete, nearest rounding (the release)": lambda budget: DivPrune.release(budget)}),
        *of(
            PruMerge(),
            {
                "sums instead of means": PruMerge(merging=NeighborMerging(weights="release")),
                "order of attention": PruMerge(order=ScoreOrder()),
                "the release, which sets its own count": PruMerge.release(),
            },
        ),
        *of(
            PruMergePlus(),
            {
                "sums instead of means": PruMergePlus(merging=NeighborMerging(weights="release")),
                "the release, which sets its own count": PruMergePlus.release(),
            },
        ),
        *of(
            VisionZip(),
            {
                "sums instead of means": VisionZip(merging=ContextualMerging(combine="sum")),
                "targets by whole steps from the first on": VisionZip(merging=ContextualMerging(spacing="step")),
                "CLS as one of the tokens": VisionZip(merging=ContextualMerging(cls=True)),
                "all three, in the order of the release": VisionZip(merging=contextual, order=order),
            },
        ),
        *of(
            trim,
            {
                "merged token after the others": replace(trim, order=MergedLastOrder()),
                "cosines instead of dot products": replace(trim, selection=TopRelevanceSelection(whole)),
            },
        ),
        *of(
            VTCCLS(),
            {"the last 30 % of the layers instead of three": VTCCLS(selection=TopAttentionSelection(layer=[-3, -2]))},
        ),
        *of(
            HERO(text_model="mini"),
            {
                "rounding down": lambda b: HERO(
                    b, text_model="mini", allocation=SaliencyRelevanceAllocation(retention=b)
                ),
                "the release": lambda budget: HERO.release(budget, text_model="mini"),
            },
        ),
        *of(
            cdpruner,
            {
                "padding paid for, newlines dropped": replace(cdpruner, padding="ignore", newlines="drop"),
                "stretched over a large batch": replace(cdpruner, selection=StretchedOverBatch(whole)),
            },
        ),
        *of(TOPS(), {"division by the mean": TOPS(selection=OptimalPreservationSelection(rescaling="mean"))}),
        *of(
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


def moved(known: list[Deviation], first: int, number: int, budget: float) -> dict[str, tuple[float, float]]:
    """Return for each deviation the share of tokens that it does not keep any more, and of the budget that it loses.

    Strategies that read the question are given the first one of each board.

    Args:
        known: the deviations.
        first: index of the first board.
        number: number of boards.
        budget: budget as a ratio.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()
    processor, adapter = AutoProcessor.from_pretrained(mini.path()), find_adapter(model)
    needs: list[Signal] = [s for one in known for r in (one.repaired, one.deviating(budget)) for s in r.needs]
    counts: dict[str, list[tuple[int, int, int, int]]] = {}
    for board in boards(number, "heldout", first):
        inputs = processor(images=[board.image], text=["<image>"], return_tensors="pt")
        with torch.no_grad():
            image = adapter.encode(inputs, needs, text_model="mini").images[0]
        asked = adapter.embed_question(board.questions[0].text, "mini")
        text = {(kind, image.feature_layer): asked[kind] for kind in TEXT_SIGNALS}
        image = replace(image, signals={**image.signals, **text})
        for one in known:
            own, other = replace(one.repaired, budget=budget).reduce(image), one.deviating(budget).reduce(image)
            lost = int((own.kept & ~other.kept).sum())
            rows = counts.setdefault(f"{one.method}: {one.what}", [])
            rows.append((lost, own.kept_tokens, own.kept_tokens - other.kept_tokens, own.kept_tokens))
    totals = {name: np.array(rows).sum(axis=0) for name, rows in counts.items()}
    return {name: (lost / kept, missing / asked) for name, (lost, kept, missing, asked) in totals.items()}


def settings(known: list[Deviation], budget: float) -> Mapping[str, TokenReducer]:
    """Return the strategies to compare, repaired ones by the name of their method."""
    repaired = {one.method: one.repaired for one in known}
    return {**repaired, **{f"{one.method}: {one.what}": one.deviating(budget) for one in known}}


def report(known: list[Deviation], results: Results, shares: dict[str, tuple[float, float]], budget: float) -> str:
    """Return the table of one budget as Markdown."""
    lines = [f"| at {budget:.0%} | tokens moved | budget lost | accuracy minus repaired, points |\n|---|---|---|---|"]
    for one in known:
        name = f"{one.method}: {one.what}"
        pairs = zip(results.of((name, budget)), results.of((one.method, budget)), strict=True)
        points = in_points([a - b for a, b in pairs])
        lines.append(f"| {name} | {shares[name][0]:.1%} | {shares[name][1]:.1%} | {points} |")
    return "\n".join(lines)


def main(
    number: int = 125, first: int = 1000, budgets: list[float] | None = None, methods: list[str] | None = None
) -> None:
    """Measure every deviation and print the tables.

    Args:
        number: number of held-out boards.
        first: index of the first board.
        budgets: budgets as ratios; 5, 10 and 20 % if left out.
        methods: names of methods; all of them if left out.
    """
    known = [one for one in deviations() if methods is None or one.method in methods]
    for budget in budgets or [0.05, 0.1, 0.2]:
        results = measure(first, number, [budget], settings(known, budget))
        print(f"{number} boards, {sum(map(len, results.kinds))} questions\n")
        print(report(known, results, moved(known, first, number, budget), budget) + "\n", flush=True)


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
