"""Shows how far a run has come, and ends it cleanly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tokenprune.experiments.evaluation.experiment import Progress


def show(work: Callable[[Callable[[Progress], None]], Progress], out: Path, quiet: bool = False) -> int:
    """Run something with a progress bar on stderr, and say at the end what was done.

    Args:
        work: the run; it is given a function to be told of progress.
        out: the run directory.
        quiet: show nothing.

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

        def tell(progress: Progress) -> None:
            score, number = progress.scores.get(progress.setting, (0.0, 0))
            shown = f"{100 * score / number:.1f} %" if number else ""
            bar.update(task, total=progress.total, completed=progress.done, description=progress.setting, score=shown)

        try:
            progress = work(tell)
        except KeyboardInterrupt:
            bar.stop()
            print(f"stopped; the same command goes on where it was ({out})", file=sys.stderr)
            raise
    if not quiet:
        each = f"{progress.encodes / progress.images:g}" if progress.images else "0 (all was done)"
        print(f"{progress.done} records in {out}; encodes per image: {each}", file=sys.stderr)
        if progress.more_encodes:
            print(
                f"beside these, {progress.more_encodes} passes at another resolution (ImageDownsample)", file=sys.stderr
            )
    if progress.errors:
        print(
            f"{progress.errors} samples failed; their records say why (field `error`). The same command with "
            "--retry-errors tries them again",
            file=sys.stderr,
        )
    return int(progress.errors > 0)
