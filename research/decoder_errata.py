"""Measures deviations between papers and releases of strategies inside the LLM, on held-out boards.

Run it: ``python -m research.decoder_errata --number 30``

Each strategy has one cut before layer 1 of the 3 layers of the embedded model; a budget is a ratio of the tokens that
entered the LLM.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from research.heldout import board_interval, format_difference, measure_strategies
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import DART, FEATHER, PyramidDrop, SparseVLM

CUT = ((1, 0.5),)
BUDGETS = (0.05, 0.1, 0.2)
DEVIATIONS: Mapping[str, tuple[TokenReducer, TokenReducer]] = {
    "PyramidDrop: positions counted anew": (
        PyramidDrop(schedule=CUT),
        PyramidDrop(schedule=CUT, positions="reindex"),
    ),
    "SparseVLM: attention divided by the similarity of rotated unit vectors": (
        SparseVLM(schedule=CUT),
        SparseVLM(schedule=CUT, rotary="divide"),
    ),
    "SparseVLM: all heads instead of 14 of 32": (SparseVLM(schedule=CUT), SparseVLM(schedule=CUT, heads=1.0)),
    "SparseVLM: dropped tokens merged, counted in the budget": (
        SparseVLM(schedule=CUT),
        SparseVLM(schedule=CUT, merging="counted"),
    ),
    "DART: pivots by the L1 norm of rotated keys": (DART(layer=1), DART(layer=1, norm="l1")),
    "DART: pivots in the order of a Python set": (DART(layer=1), DART(layer=1, image_start=35)),
    "FEATHER: no evenly spaced tokens": (FEATHER(schedule=CUT), FEATHER(schedule=CUT, stride=0)),
}
"""The repaired strategy and the strategy with one deviation, by name of the deviation."""


def main(number: int = 30, first: int = 1000) -> None:
    """Print the effect of each deviation.

    Args:
        number: number of boards; each has about 18 questions.
        first: index of the first board.
    """
    reducers: dict[str, TokenReducer] = {}
    for name, (repaired, deviating) in DEVIATIONS.items():
        reducers |= {name: deviating, f"{name} (repaired)": repaired}
    results = measure_strategies(first, number, BUDGETS, reducers)
    print(f"{number} boards, {sum(map(len, results.kinds))} questions\n")
    print("| deviation | budget | repaired, % | deviation minus repaired, points |\n|---|---|---|---|")
    for name in DEVIATIONS:
        for budget in BUDGETS:
            repaired_rows = results.answers_of((f"{name} (repaired)", budget))
            pairs = zip(results.answers_of((name, budget)), repaired_rows, strict=True)
            mean, low, high = board_interval(repaired_rows)
            difference = format_difference([np.subtract(a, b) for a, b in pairs])
            print(
                f"| {name} | {budget:.0%} | {100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] | {difference} |",
                flush=True,
            )


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
