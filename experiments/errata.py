"""How much each deviation of HiRED's release from its paper matters, one at a time, on the held-out boards.

Run it: ``python -m tokenprune.experiments.errata``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from tokenprune.adapter import find_adapter
from tokenprune.experiments.heldout import interval, measure
from tokenprune.image import Signal
from tokenprune.models import mini
from tokenprune.models.mini.boards import boards
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import HiRED
from tokenprune.strategies.components import VisualContentAllocation


def deviations() -> Mapping[str, TokenReducer]:
    """Return `HiRED()` with one part each as the release (or the paper) has it."""
    part = VisualContentAllocation
    return {
        "stripes instead of true regions": HiRED(allocation=part(region="stripe")),
        "even quadrants instead of true regions": HiRED(allocation=part(region="quadrant")),
        "count of top tokens instead of attention mass": HiRED(
            allocation=VisualContentAllocation(statistic="top_count")
        ),
        "rounding down instead of largest remainder": HiRED(allocation=part(rounding="floor")),
        "padding paid for instead of excluded": HiRED(padding="ignore"),
        "newlines dropped instead of kept with their rows": HiRED(newlines="drop"),
        "the release, all of these": HiRED.release(),
    }


def moved(first: int, number: int, budget: float) -> dict[str, tuple[float, float]]:
    """Return for each deviation the share of HiRED's tokens that it does not keep, and of the budget that it loses.

    Args:
        first: index of the first board.
        number: number of boards.
        budget: budget as a ratio.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()
    processor, adapter = AutoProcessor.from_pretrained(mini.path()), find_adapter(model)
    needs = [Signal("cls_attention", "first"), Signal("cls_attention", "feature")]
    counts: dict[str, list[tuple[int, int, int, int]]] = {}
    for board in boards(number, "heldout", first):
        inputs = processor(images=[board.image], text=["<image>"], return_tensors="pt")
        with torch.no_grad():
            image = adapter.encode(inputs, needs).images[0]
        own = HiRED(budget).reduce(image)
        for name, reducer in deviations().items():
            other = replace(reducer, budget=budget).reduce(image)
            lost = int((own.kept & ~other.kept).sum())
            counts.setdefault(name, []).append((lost, own.kept_tokens, other.asked - other.kept_tokens, other.asked))
    totals = {name: np.array(rows).sum(axis=0) for name, rows in counts.items()}
    return {name: (lost / kept, missing / asked) for name, (lost, kept, missing, asked) in totals.items()}


def main(number: int = 125, first: int = 1000, budgets: list[float] | None = None) -> None:
    """Print a table: deviations by tokens moved, budget lost, and accuracy against `HiRED()` with intervals.

    Args:
        number: number of held-out boards.
        first: index of the first board.
        budgets: budgets as ratios; 5, 10 and 20 % if left out.
    """
    chosen = budgets or [0.05, 0.1, 0.2]
    results = measure(first, number, chosen, {"HiRED": HiRED(), **deviations()})
    print(f"{number} boards, {sum(map(len, results.kinds))} questions\n")
    for budget in chosen:
        print(f"| at {budget:.0%} | tokens moved | budget lost | accuracy minus HiRED(), points |\n|---|---|---|---|")
        for name, (share, missing) in moved(first, number, budget).items():
            pairs = zip(results.of((name, budget)), results.of(("HiRED", budget)), strict=True)
            mean, low, high = interval([a - b for a, b in pairs])
            seen = "no difference seen" if low <= 0 <= high else "difference seen"
            points = f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], {seen}"
            print(f"| {name} | {share:.1%} | {missing:.1%} | {points} |")
        print()


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
