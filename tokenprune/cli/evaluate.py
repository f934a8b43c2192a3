"""The command `tokenprune evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import NonNegativeInt

from tokenprune.cli.errors import UserError
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.cli.progress import print_settings, run_with_progress
from tokenprune.experiments.analysis.results import read_setting
from tokenprune.experiments.evaluation.experiment import (
    Experiment,
    Setting,
    check_records,
    discard_records,
    rank_and_world,
)
from tokenprune.experiments.evaluation.records import remove_failed
from tokenprune.experiments.evaluation.stored_images import IMAGES
from tokenprune.experiments.evaluation.tasks import Task, tasks
from tokenprune.experiments.tracking.publish import run_tracked


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Options of the commands that write records.

    Args:
        retry_errors: run samples again that failed before.
        fresh: delete existing records and run all samples again.
        images: number of images to store in the run directory, evenly spread, with the kept tokens in their records; a
            report needs them to show failures; 0 stores none.
        quiet: print neither progress nor the table of results.
    """

    retry_errors: bool = False
    fresh: bool = False
    images: NonNegativeInt = IMAGES
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RecordConfig):
    """Options of `tokenprune evaluate`, in addition to the fields of an `Experiment`.

    Args:
        out: run directory.
        wandb: W&B project; without an API key the run is only stored locally.
    """

    out: str = "tokenprune-runs"
    wandb: str | None = None


def parse_evaluate(argv: Sequence[str]) -> tuple[Experiment, EvaluateConfig]:
    """Return the experiment and the further options of a command line.

    Args:
        argv: the arguments after `tokenprune evaluate`.

    Raises:
        UserError: if an option is not valid.
    """
    description = "Run or continue one experiment; write one record per sample."
    parser = build_parser("tokenprune evaluate", description, Experiment, EvaluateConfig, file=True)
    options = parse_options(parser, argv, {"task": (Task, tasks())})
    return select_fields(Experiment, options), select_fields(EvaluateConfig, options)


def run(argv: Sequence[str]) -> int:
    """Run the command `evaluate`, and return the exit code: 1 if samples failed, otherwise 0."""
    experiment, config = parse_evaluate(argv)
    setting = Setting(experiment, f"{experiment.reducer.label}, budget={experiment.reducer.budget_label}")
    out = Path(config.out)
    if config.fresh and rank_and_world()[1] > 1:
        raise UserError("--fresh cannot be used under torchrun; run the command once without torchrun")
    if config.fresh:
        discard_records([setting], out)
    if config.retry_errors:
        remove_failed(setting.folder(out))
    check_records([setting], out)  # before W&B receives records of another state
    rank, world = rank_and_world()
    code = run_with_progress(
        lambda on_progress: run_tracked(setting, out, config.wandb, rank, world, on_progress, config.images),
        out,
        config.quiet,
    )
    if rank == 0 and not config.quiet:
        print_settings([read_setting(setting.folder(out))])
    return code
