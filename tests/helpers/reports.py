"""An ablation with a known result, and the tables of its report."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tests.helpers.records import board_records, write_setting

BUDGETS = (0.1, 0.2)


def make_scores(share: float, seed: int = 0) -> list[list[float]]:
    """Return scores of 24 boards with 6 questions; right answers at a share are also right at any larger share."""
    ease = np.random.default_rng(seed).random((24, 6))
    return (ease < share).astype(float).tolist()


def write_run_directory(directory: Path, full: bool = True, random: bool = True) -> Path:
    """Write a small ablation with a known result."""
    if full:
        write_setting(directory, board_records(make_scores(0.9), asked=400, kept=400), "HiRED", 1.0, "full")
    for allocation, gain in (("UniformAllocation", 0.0), ("VisualContentAllocation", 0.0), ("GuidedAllocation", 0.2)):
        for budget in BUDGETS:
            factors = {"reducer.allocation": allocation, "reducer.budget": budget}
            kept = int(400 * budget)
            write_setting(
                directory,
                board_records(make_scores(0.5 + gain + budget), asked=kept, kept=kept),
                factors=factors,
                budget=budget,
            )
    for budget in BUDGETS:
        write_setting(
            directory, board_records(make_scores(0.3 + budget)), "UniformStride", budget, "baseline", factors={}
        )
        for seed in range(3 if random else 0):
            answers = board_records(make_scores(0.3 + budget, seed), generate_ms=5.0 + seed)
            write_setting(directory, answers, "Random", budget, "baseline", seed, factors={})
    return directory


def parse_table(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the first table below a heading of a Markdown text, including its head."""
    match = re.search(r"(^\|.*\n)+", text.split(f" {heading}\n", 1)[1], re.MULTILINE)
    assert match
    lines = [line for line in match.group().splitlines() if "---" not in line]
    return [[entry.strip() for entry in line.strip("| ").split(" | ")] for line in lines]
