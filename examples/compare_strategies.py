"""Compare strategies at several budgets on the embedded model, and write tables and figures.

Run it: ``python examples/compare_strategies.py`` (about two minutes on two CPU cores)
"""

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
    settings = [Setting(Experiment("mini", HiRED(1.0), Boards(boards)), "full tokens", role="full")]
    for budget in budgets:
        for strategy in (HiRED, Random):
            name = f"{strategy.__name__}, budget={budget}"
            settings.append(Setting(Experiment("mini", strategy(budget), Boards(boards)), name))
    run_settings(settings, out)
    for file in write_report(out):
        print(file)


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
