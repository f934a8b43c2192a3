"""The command `tokenprune evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt

from tokenprune.cli.errors import INPUT_ERRORS, add_flag, user_error
from tokenprune.cli.progress import run_with_progress
from tokenprune.experiments.evaluation.experiment import Setting, check_records, discard_records, rank_and_world
from tokenprune.experiments.evaluation.grid import experiment_parser, parse_experiment
from tokenprune.experiments.evaluation.records import remove_failed
from tokenprune.experiments.evaluation.stored_images import IMAGES
from tokenprune.experiments.tracking.publish import run_tracked


def evaluate_parser() -> ArgumentParser:
    """Return the parser of `tokenprune evaluate`."""
    parser = experiment_parser("tokenprune evaluate", "Run or continue one experiment; write one record per sample.")
    parser.add_argument("--out", default="tokenprune-runs", help="run directory")
    parser.add_argument("--wandb", type=str, help="W&B project; without an API key the run is only stored locally")
    add_flag(parser, "--retry-errors", "run samples again that failed before")
    add_flag(parser, "--fresh", "delete existing records and run all samples again")
    add_stored_images(parser)
    add_flag(parser, "--quiet", "show no progress")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command `evaluate`, and return the exit code: 1 if samples failed, otherwise 0."""
    parser = evaluate_parser()
    options = Namespace()  # type: ignore[no-untyped-call]
    try:
        experiment = parse_experiment(list(argv), parser, options)
    except INPUT_ERRORS as error:
        raise user_error(error, parser) from error
    setting = Setting(experiment, f"{type(experiment.reducer).__name__}, budget={experiment.reducer.budget}")
    out = Path(options.out)
    if options.fresh and rank_and_world()[1] > 1:
        raise user_error(
            ValueError("--fresh cannot be used under torchrun; run the command once without torchrun"), parser
        )
    if options.fresh:
        discard_records([setting], out)
    if options.retry_errors:
        remove_failed(setting.folder(out))
    check_records([setting], out)  # before W&B receives records of another state
    rank, world = rank_and_world()
    return run_with_progress(
        lambda on_progress: run_tracked(setting, out, options.wandb, rank, world, on_progress, options.images),
        out,
        options.quiet,
    )


def add_stored_images(parser: ArgumentParser) -> None:
    """Add the option `--images` of commands that store images.

    Args:
        parser: the parser of the command.
    """
    parser.add_argument(
        "--images",
        type=NonNegativeInt,
        default=IMAGES,
        help="number of images to store in the run directory, evenly spread, with the kept tokens in their records; "
        "a report needs them to show failures; 0 stores none",
    )
