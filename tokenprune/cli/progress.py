"""Runs experiments with a progress bar on stderr, and prints a summary at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tokenprune.experiments.evaluation.experiment import Progress


def run_with_progress(work: Callable[[Callable[[Progress], None]], Progress], out: Path, quiet: bool = False) -> int:
    """Run a function with a progress bar on stderr, print a summary, and return the exit code.

    Args:
        work: function that runs the experiments. Its argument is a callback, to call after every record.
        out: the run directory.
        quiet: print neither bar nor summary, only failed samples.

    Returns:
        The exit code: 0, or 1 if samples failed.
    """
    console = Console(stderr=True, quiet=quiet)
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[score]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task("", total=None, score="")

        def update_bar(progress: Progress) -> None:
            score, number = progress.scores.get(progress.setting, (0.0, 0))
            text = f"{100 * score / number:.1f} %" if number else ""
            bar.update(task, total=progress.total, completed=progress.done, description=progress.setting, score=text)

        try:
            progress = work(update_bar)
        except KeyboardInterrupt:
            bar.stop()
            print(f"stopped; run the same command to continue ({out})", file=sys.stderr)
            raise
    if not quiet:
        per_image = f"{progress.encodes / progress.images:g}" if progress.images else "0 (all records exist)"
        print(f"{progress.done} records in {out}; encodes per image: {per_image}", file=sys.stderr)
        if progress.more_encodes:
            print(
                f"plus {progress.more_encodes} passes for strategies before or inside the vision tower", file=sys.stderr
            )
    if progress.errors:
        print(
            f"{progress.errors} samples failed; the field `error` of their records holds the reason. Run the same "
            "command with --retry-errors to try them again",
            file=sys.stderr,
        )
    return int(progress.errors > 0)
