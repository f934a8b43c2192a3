"""Every experiment against full tokens, and against random tokens at its budget."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.experiments.analysis.stats import Cell, Difference, compare, corrected, full_of, randoms_of


def against_full(cells: Sequence[Cell]) -> list[tuple[Cell, Difference]]:
    """Return every experiment minus full tokens, corrected over all of them.

    Args:
        cells: experiments of one setting.
    """
    pairs = [(cell, full_of(cell, cells)) for cell in cells if cell.role != "full"]
    found = [(cell, compare(cell, full)) for cell, full in pairs if full is not None]
    fixed = corrected([difference for _, difference in found])
    return [(cell, difference) for (cell, _), difference in zip(found, fixed, strict=True)]


def against_random(cells: Sequence[Cell]) -> list[tuple[Cell, int, Difference]]:
    """Return every experiment minus each seed of random tokens at its budget, corrected over all of them.

    Args:
        cells: experiments of one setting.
    """
    chosen = [cell for cell in cells if cell.role != "full" and cell.strategy != "Random"]
    found = [(cell, seed, compare(cell, other)) for cell in chosen for seed, other in randoms_of(cell, cells).items()]
    fixed = corrected([difference for *_, difference in found])
    return [(cell, seed, difference) for (cell, seed, _), difference in zip(found, fixed, strict=True)]
