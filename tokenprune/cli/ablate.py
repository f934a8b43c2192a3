"""The command `tokenprune ablate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from tokenprune.cli.errors import add_flag, parse_options
from tokenprune.cli.evaluate import add_stored_images
from tokenprune.cli.progress import run_with_progress
from tokenprune.experiments.evaluation.experiment import rank_and_world
from tokenprune.experiments.evaluation.grid import ablate, expand, load_config, select_shard
from tokenprune.experiments.tracking.publish import publish


def run(argv: Sequence[str]) -> int:
    """Run the command `ablate`, and return the exit code: 1 if samples failed, otherwise 0."""
    parser = ArgumentParser(
        prog="tokenprune ablate",
        exit_on_error=False,
        allow_abbrev=False,
        description="Run or continue a grid of experiments; every image is encoded once for all settings.",
    )
    parser.add_argument("grid", type=str, help="YAML file of the ablation")
    parser.add_argument("--out", type=str, help="run directory; by default tokenprune-runs/NAME of the file")
    parser.add_argument("--workers", type=int, default=1, help="number of processes that share the images, one per GPU")
    parser.add_argument("--shard", type=str, help="i/n: every n-th setting from the i-th on, for job arrays")
    parser.add_argument("--wandb", type=str, help="W&B project; all settings are published after the grid has run")
    add_flag(parser, "--retry-errors", "run samples again that failed before")
    add_flag(parser, "--fresh", "delete existing records and run all samples again")
    add_stored_images(parser)
    add_flag(parser, "--dry-run", "list the settings and stop")
    add_flag(parser, "--quiet", "show no progress")
    config = parse_options(parser, argv)
    if config.dry_run:
        settings = select_shard(expand(load_config(config.grid)), config.shard)
        print("\n".join(f"{setting.experiment.hash()}  {setting.role:8}  {setting.name}" for setting in settings))
        print(f"{len(settings)} settings")
        return 0
    out = Path(config.out or f"tokenprune-runs/{Path(config.grid).stem}")
    grid, shard, workers, images = config.grid, config.shard, config.workers, config.images
    retry, fresh = config.retry_errors, config.fresh
    code = run_with_progress(
        lambda on_progress: ablate(grid, out, shard, workers, on_progress, retry, images, fresh), out, config.quiet
    )
    if config.wandb is not None and rank_and_world()[0] == 0:
        publish(out, config.wandb)
    return code
