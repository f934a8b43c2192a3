"""Searches a strategy for dense images on training images: ``python -m research.strategy_search --name families``.

Each round compares some strategies on images of the split ``train``. `QuestionFirst` is the result; the docstrings of
the selections in `research.tried_selections` describe the tried alternatives. Each image is encoded once for all
settings. The rounds up to "anchors" led to the first version of `QuestionFirst`, with the weights of commit 0a7a71d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from research.heldout import board_interval
from research.tried_selections import (
    MODEL,
    Combined,
    ImageTopAllocation,
    NeighborRelevance,
    SpreadSelection,
    TopWeightSelection,
    anchored,
    first_version,
)
from research.which_method import FULL, list_projector_strategies, list_two_stages, measure_world
from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.models.mini.boards import Split
from tokenprune.policies import SelectionPolicy
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import EADP, SCOPE, TOPS, CDPruner, DivPrune, HiRED, QuestionFirst
from tokenprune.strategies.cdpruner import ConditionalDiversitySelection
from tokenprune.strategies.components import GlobalTopAllocation, SaliencyCoverageSelection, TopRelevanceSelection
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.relevance import AttentionRelevance, MeanRelevance, TextRelevance
from tokenprune.strategies.eadp import FacilityLocationSelection
from tokenprune.strategies.question_first import QuestionFirstSelection

PUBLISHED = ("HiRED", "DivPrune", "CDPruner", "TRIM", "EADP", "SCOPE", "VisPruner", "Random, seed 0")
"""Published strategies that are measured for comparison during the search."""


def spread(**options: Any) -> ComponentReducer:
    """Return a strategy that ranks the tokens of all tiles by `SpreadSelection`."""
    return ComponentReducer(allocation=ImageTopAllocation(), selection=SpreadSelection(**options), text_model=MODEL)


def chosen(**options: Any) -> ComponentReducer:
    """Return the best strategy of the first rounds with other options."""
    return spread(**{"weight": 10.0, "threshold": 2.5, "discount": 0.0, **options})


def parts(**options: Any) -> QuestionFirst:
    """Return QuestionFirst with other options of its selection."""
    return QuestionFirst(text_model=MODEL, selection=QuestionFirstSelection(**options))


def pooled(selection: SelectionPolicy) -> ComponentReducer:
    """Return a selection over the tokens of all tiles."""
    return ComponentReducer(allocation=GlobalTopAllocation(), selection=selection, text_model=MODEL)


def list_round(name: str) -> dict[str, TokenReducer]:
    """Return the settings of a round of the search by name."""
    early, deviation = AttentionRelevance(0), MeanRelevance()
    mixed = Combined([AttentionRelevance(), deviation], [0.5, 0.5])
    rounds: dict[str, dict[str, TokenReducer]] = {
        "published": {n: r for n, r in list_projector_strategies().items() if n in PUBLISHED},
        "families": {
            **{f"spread weight={w}": spread(weight=w) for w in (0.0, 0.5, 1.0, 3.0)},
            **{f"spread discount={d}": spread(weight=1.0, discount=d) for d in (0.0, 0.2, 0.4)},
            "spread alike": spread(weight=1.0, discount=0.2, alike=True),
            "spread wide": spread(weight=1.0, rows=1, cols=2),
            "spread early": spread(weight=1.0, saliency=early),
            "spread deviation": spread(weight=1.0, saliency=deviation),
            "spread mixed": spread(weight=1.0, saliency=mixed),
            "spread without base": spread(weight=1.0, base=-9.0),
            **{f"anchored share={s}": anchored(share=s) for s in (0.0, 0.3, 0.5, 0.7, 1.0)},
            **{f"anchored threshold={t}": anchored(threshold=t) for t in (1.0, 3.0)},
            "anchored attention": anchored(quality=AttentionRelevance()),
            "anchored deviation": anchored(quality=deviation),
            "anchored top": anchored(quality=AttentionRelevance(), fill="top"),
            "pooled CDPruner": pooled(ConditionalDiversitySelection()),
            "pooled TRIM": pooled(TopRelevanceSelection(TextRelevance(likeness="dot"))),
            "pooled cosine": pooled(TopRelevanceSelection()),
            "pooled EADP": pooled(FacilityLocationSelection()),
            "pooled SCOPE": pooled(SaliencyCoverageSelection()),
        },
        "thresholds": {
            **{
                f"spread threshold={t} discount={d}": spread(weight=10.0, threshold=t, discount=d)
                for t in (1.5, 2.0, 2.5, 3.0)
                for d in (0.0, 0.1, 0.2)
            },
            "anchored top": anchored(quality=AttentionRelevance(), fill="top"),
        },
        "saliency": {
            "spread deviation": spread(weight=10.0, threshold=2.0, saliency=deviation),
            "spread mixed": spread(weight=10.0, threshold=2.0, saliency=mixed),
            "spread layers": spread(weight=10.0, threshold=2.0, saliency=AttentionRelevance([-3, -2])),
            "spread early and late": spread(
                weight=10.0, threshold=2.0, saliency=Combined([early, AttentionRelevance()], [0.5, 0.5])
            ),
            "spread alike": spread(weight=10.0, threshold=2.0, alike=True),
            "spread wide": spread(weight=10.0, threshold=2.0, rows=1, cols=2),
            "spread square": spread(weight=10.0, threshold=2.0, rows=2, cols=2, discount=0.05),
            "spread row": spread(weight=10.0, threshold=2.0, rows=0, cols=2, discount=0.2),
            "spread base -0.2": spread(weight=10.0, threshold=2.0, base=-0.2),
            "spread base -0.4": spread(weight=10.0, threshold=2.0, base=-0.4),
            "spread base +0.2": spread(weight=10.0, threshold=2.0, base=0.2),
            "spread dot": spread(weight=10.0, threshold=2.0, relevance=TextRelevance(likeness="dot")),
            "pooled CDPruner": pooled(ConditionalDiversitySelection()),
        },
        "combined": {
            "attention": chosen(),
            "mixed": chosen(saliency=mixed),
            "deviation": chosen(saliency=deviation),
            **{f"base {base}": chosen(base=base) for base in (-0.1, -0.2, -0.4)},
            **{f"threshold {t}": chosen(threshold=t) for t in (2.25, 2.75)},
            "mixed, base -0.2": chosen(saliency=mixed, base=-0.2),
            "alike": chosen(alike=True, discount=0.1),
            "mixed, alike": chosen(saliency=mixed, alike=True, discount=0.1),
        },
        "fill": {
            "max-min": anchored(threshold=2.5, share=1.0),
            "max-min by attention": anchored(threshold=2.5, share=1.0, quality=AttentionRelevance()),
            "max-min by mixed": anchored(threshold=2.5, share=1.0, quality=mixed),
            "max-min by squared mixed": anchored(threshold=2.5, share=1.0, quality=mixed, power=2.0),
            "top mixed, half": anchored(threshold=2.5, share=0.5, quality=mixed, fill="top"),
            "max-min by mixed, half": anchored(threshold=2.0, share=0.5, quality=mixed),
            "dot": chosen(relevance=TextRelevance(likeness="dot")),
            "CDPruner, pooled": pooled(ConditionalDiversitySelection()),
            "DivPrune": DivPrune(),
        },
        "weights": {
            **{
                f"attention {w}": chosen(saliency=Combined([AttentionRelevance(), deviation], [w, 1 - w]))
                for w in (0.3, 0.5, 0.7)
            },
            "image deviation": chosen(saliency=Combined([AttentionRelevance(), MeanRelevance("image")], [0.5, 0.5])),
            "mixed, threshold 2": chosen(saliency=mixed, threshold=2.0),
            "mixed, threshold 3": chosen(saliency=mixed, threshold=3.0),
            "mixed, alike": chosen(saliency=mixed, alike=True, discount=0.1),
            "mixed, no question": replace(chosen(saliency=mixed, relevance=None), text_model=None),
            "DivPrune": DivPrune(),
            "HiRED": HiRED(),
            "pooled CDPruner": pooled(ConditionalDiversitySelection()),
            "CDPruner": CDPruner(text_model=MODEL),
        },
        "anchors": {
            **{
                f"top mixed, share {s}, threshold {t}": anchored(threshold=t, share=s, quality=mixed, fill="top")
                for s, t in ((0.5, 2.5), (0.5, 3.0), (0.3, 2.5), (0.3, 3.0))
            },
            **{
                f"max-min by mixed, share {s}, threshold {t}": anchored(threshold=t, share=s, quality=mixed)
                for s, t in ((0.5, 2.5), (0.3, 2.5))
            },
        },
        "separate digits": {
            **{
                f"first version, threshold {t}, share {share}": first_version(threshold=t, share=share)
                for t in (1.5, 2.0, 2.5)
                for share in (0.5, 1.0)
            },
            "spread": chosen(saliency=mixed),
            **{f"spread cols={c}": chosen(saliency=mixed, relevance=NeighborRelevance(cols=c)) for c in (1, 2, 3)},
            "spread both cols=1": chosen(
                saliency=Combined([NeighborRelevance(AttentionRelevance()), NeighborRelevance(deviation)], [0.5, 0.5]),
                relevance=NeighborRelevance(cols=2),
            ),
            "max-min by mixed": anchored(threshold=2.5, share=1.0, quality=mixed),
            "max-min by mixed, half": anchored(threshold=2.5, share=0.5, quality=mixed),
            "HiRED": HiRED(),
            "DivPrune": DivPrune(),
            "CDPruner": CDPruner(text_model=MODEL),
            "TOPS": TOPS(),
            "SCOPE": SCOPE(),
            "EADP": EADP(text_model=MODEL),
        },
        "weighted distances": {
            **{
                f"anchors, cols={c}": anchored(
                    relevance=NeighborRelevance(cols=c), threshold=2.5, share=0.5, quality=mixed
                )
                for c in (1, 2, 3)
            },
            **{
                f"weights, neighbors={n}, threshold={t}, weight={w}": parts(
                    saliency=mixed, neighbors=n, threshold=t, weight=w
                )
                for n in (0, 2)
                for t, w in ((1.0, 1.0), (1.0, 4.0), (2.0, 4.0))
            },
            "without question": parts(saliency=mixed, weight=0.0),
            "DivPrune": DivPrune(),
            "CDPruner": CDPruner(text_model=MODEL),
        },
        "neighborhoods": {
            **{f"neighbors={n}": parts(saliency=mixed, neighbors=n) for n in (1, 2, 3, 4)},
            **{f"threshold={t}": parts(saliency=mixed, neighbors=2, threshold=t) for t in (0.5, 1.5)},
            **{f"weight={w}": parts(saliency=mixed, neighbors=2, weight=w) for w in (4.0, 8.0)},
            **{f"power={p}": parts(saliency=mixed, neighbors=2, power=p) for p in (0.0, 0.25, 1.0)},
            "attention": parts(neighbors=2),
            "dot": parts(saliency=mixed, neighbors=2, relevance=TextRelevance(likeness="dot")),
        },
        "saliency of weights": {
            **{
                f"{label}, threshold={t}, weight={w}": parts(saliency=mixed, threshold=t, weight=w, power=p)
                for label, p in (("mixed", 0.5), ("no saliency", 0.0))
                for t, w in ((1.0, 2.0), (1.0, 4.0), (0.5, 4.0))
            },
            "attention": parts(),
            "deviation": parts(saliency=MeanRelevance("image")),
            "no neighbors": parts(saliency=mixed, neighbors=0),
            "no question": parts(saliency=mixed, weight=0.0),
            "DivPrune": DivPrune(),
        },
        "parts": {
            "QuestionFirst": QuestionFirst(text_model=MODEL),
            "without relevance": parts(weight=0.0),
            "without neighbors": parts(neighbors=0),
            "without saliency": parts(power=0.0),
            "without distances": pooled(TopWeightSelection()),
            "equal budgets per tile": QuestionFirst(text_model=MODEL, allocation=UniformAllocation()),
            "deviation from the mean as saliency": parts(saliency=MeanRelevance()),
            "threshold 0.5": parts(threshold=0.5),
            "threshold 1.5": parts(threshold=1.5),
            "HiRED": HiRED(),
            "DivPrune": DivPrune(),
        },
    }
    return rounds[name]


def list_settings(name: str, averages: Sequence[float]) -> dict[str, TokenReducer]:
    """Return the settings of a round with budgets that give the average tokens, by average and name.

    Args:
        name: name of the round; ``two stages`` contains compositions, see `list_two_stages`.
        averages: average tokens as ratios.
    """
    if name == "two stages":
        return {f"{average} {key}": value for average in averages for key, value in list_two_stages(average).items()}
    return {
        f"{average} {key}": replace(reducer, budget=Budget(average, of="unpadded"))
        for average in averages
        for key, reducer in list_round(name).items()
    }


def main(
    name: str = "families",
    world: str = "pages",
    number: int = 20,
    first: int = 0,
    averages: tuple[float, ...] = (0.05, 0.1),
    split: Split = "train",
) -> None:
    """Measure a round of the search and print right answers in percent with intervals, and coverage, best first.

    Args:
        name: name of the round.
        world: ``boards`` or ``pages``.
        number: number of images.
        first: index of the first image.
        averages: average tokens as ratios.
        split: ``train``; ``heldout`` only for the ablation of the final strategy.
    """
    settings = list_settings(name, averages)
    results = measure_world(world, settings, number, first, split)

    def cell(key: str) -> str:
        return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in board_interval(results.answers_of(key))))

    print(f"{sum(map(len, results.questions))} questions, all tokens {cell(FULL)}")
    for average in averages:
        keys = [key for key in settings if key.startswith(f"{average} ")]
        for key in sorted(keys, key=lambda key: -np.concatenate(results.right[key]).mean()):
            print(f"{cell(key)}  coverage {100 * np.concatenate(results.coverage[key]).mean():.1f}  {key}")


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
