"""The command `tokenprune ablate`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenprune.cli.errors import UserError
from tokenprune.cli.evaluate import RecordConfig
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.cli.progress import print_settings, run_with_progress
from tokenprune.display import format_count
from tokenprune.experiments.analysis.results import read_results
from tokenprune.experiments.evaluation.experiment import rank_and_world
from tokenprune.experiments.evaluation.grid import EXPERIMENT_KEYS, ablate, expand, load_config, select_shard
from tokenprune.experiments.tracking.publish import publish


@dataclass(frozen=True, kw_only=True)
class AblateConfig(RecordConfig):
    """Options of `tokenprune ablate`.

    Args:
        grid: YAML file of the ablation.
        out: run directory; by default tokenprune-runs/NAME of the file.
        workers: number of processes that share the images, one per GPU.
        shard: i/n: every n-th setting from the i-th on, for job arrays.
        wandb: W&B project; all settings are published after the grid has run.
        dry_run: list the settings and stop.
    """

    grid: str
    out: str | None = None
    workers: int = 1
    shard: str | None = None
    wandb: str | None = None
    dry_run: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command `ablate`, and return the exit code: 1 if samples failed, otherwise 0."""
    description = "Run or continue a grid of experiments; every image is encoded once for all settings."
    parser = build_parser("tokenprune ablate", description, AblateConfig)
    keys = [re.split(r"[.=]", word)[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")]
    if key := next((key for key in keys if key in (*EXPERIMENT_KEYS, "budget")), None):
        option = "reducer.budget" if key == "budget" else key
        raise UserError(f"--{key} is no option of ablate; set {option} in the YAML file, or vary it under `grid`")
    config = select_fields(AblateConfig, parse_options(parser, argv))
    if config.dry_run:
        settings = select_shard(expand(load_config(config.grid)), config.shard)
        print("\n".join(f"{setting.experiment.hash()}  {setting.role:8}  {setting.name}" for setting in settings))
        print(format_count(len(settings), "setting"))
        return 0
    out = Path(config.out or f"tokenprune-runs/{Path(config.grid).stem}")
    code = run_with_progress(
        lambda on_progress: ablate(
            config.grid,
            out,
            config.shard,
            config.workers,
            on_progress,
            config.retry_errors,
            config.images,
            config.fresh,
        ),
        out,
        config.quiet,
    )
    is_first = rank_and_world()[0] == 0
    if is_first and config.wandb is not None:
        publish(out, config.wandb)
    if is_first and not config.quiet:
        print_settings(read_results(out).settings)
        print(f"tokenprune report {shlex.quote(str(out))} writes all tables and figures", file=sys.stderr)
    return code
