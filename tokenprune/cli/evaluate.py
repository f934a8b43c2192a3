"""The command `tokenprune evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt

from tokenprune.cli.errors import INPUT_ERRORS, add_flag, user_error
from tokenprune.cli.progress import show
from tokenprune.experiments.evaluation.experiment import Setting, check_records, discard_records, rank_and_world
from tokenprune.experiments.evaluation.grid import experiment_of, experiment_parser
from tokenprune.experiments.evaluation.records import forget_errors
from tokenprune.experiments.evaluation.stored_images import IMAGES
from tokenprune.experiments.tracking.publish import run_tracked


def evaluate_parser() -> ArgumentParser:
    """Return the parser of `tokenprune evaluate`."""
    parser = experiment_parser("tokenprune evaluate", "Run one experiment, or go on with it; write a record a sample.")
    parser.add_argument("--out", default="tokenprune-runs", help="run directory")
    parser.add_argument("--wandb", type=str, help="W&B project; without a key the run stays on this machine")
    add_flag(parser, "--retry-errors", "try samples again that failed before")
    add_flag(parser, "--fresh", "discard the records that are there")
    add_stored_images(parser)
    add_flag(parser, "--quiet", "show no progress")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command `evaluate`; the exit code is 1 if samples failed."""
    parser = evaluate_parser()
    own = Namespace()  # type: ignore[no-untyped-call]
    try:
        experiment = experiment_of(list(argv), parser, own)
    except INPUT_ERRORS as error:
        raise user_error(error, parser) from error
    setting = Setting(experiment, f"{type(experiment.reducer).__name__}, budget={experiment.reducer.budget}")
    out = Path(own.out)
    if own.fresh and rank_and_world()[1] > 1:
        raise user_error(
            ValueError("--fresh cannot be used under torchrun; run the command once without torchrun"), parser
        )
    if own.fresh:
        discard_records([setting], out)
    if own.retry_errors:
        forget_errors(setting.folder(out))
    check_records([setting], out)  # before W&B receives records of another state
    return show(lambda tell: run_tracked(setting, out, own.wandb, *rank_and_world(), tell, own.images), out, own.quiet)


def add_stored_images(parser: ArgumentParser) -> None:
    """Add the option `--images` of commands that store images.

    Args:
        parser: the parser of the command.
    """
    parser.add_argument(
        "--images",
        type=NonNegativeInt,
        default=IMAGES,
        help="so many images are stored in the run directory, evenly spread, with the kept tokens in their records; "
        "a report needs them to show failures, 0 stores none",
    )
