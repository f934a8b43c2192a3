"""Compare strategies at several budgets on the embedded model, and write tables and figures.

Run it: ``python examples/compare_strategies.py`` (about two minutes on two CPU cores)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from tokenprune.experiments.analysis.report import write_report
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.tasks import Boards
from tokenprune.strategies import HiRED, Random


def main(budgets: Sequence[float] = (0.1, 0.2), boards: int = 4, out: Path = Path("tokenprune-runs/compare")) -> None:
    """Evaluate HiRED, random selection and all tokens on held-out boards.

    Args:
        budgets: shares of the visual tokens to keep.
        boards: number of boards; each has about 18 questions.
        out: run directory.
    """
    reducers = [HiRED(1.0), *(reducer(budget) for budget in budgets for reducer in (HiRED, Random))]
    settings = [
        Setting(
            Experiment("mini", reducer, Boards(boards)),
            f"{type(reducer).__name__}, {reducer.budget}",
            role="full" if reducer.budget == 1.0 else "grid",
        )
        for reducer in reducers
    ]
    run_settings(settings, out)
    for file in write_report(out):
        print(file)


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
