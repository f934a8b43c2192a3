"""Runs experiments with a progress bar on stderr, and prints a summary and the results at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tokenprune.cli.status import show_status
from tokenprune.display import format_count
from tokenprune.experiments.analysis.results import Setting
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
    bar = Bar(*columns, console=console, disable=quiet)
    with ExitStack() as displays:
        status = displays.enter_context(ExitStack())
        if not quiet:
            status.enter_context(show_status("checking the settings, and loading the model"))
        task = bar.add_task("", total=None, score="")

        def update_bar(progress: Progress) -> None:
            if not bar.live.is_started:  # an error before the first record leaves no bar
                status.close()
                displays.callback(bar.stop)
                bar.start()
            score, number = progress.scores.get(progress.setting, (0.0, 0))
            text = f"{100 * score / number:.1f} %" if number else ""
            bar.update(task, total=progress.total, completed=progress.done, description=progress.setting, score=text)

        try:
            progress = work(update_bar)
        except KeyboardInterrupt:
            displays.close()
            print(f"stopped; run the same command to continue ({out})", file=sys.stderr)
            raise
    if not quiet:
        per_image = f"{progress.encodes / progress.images:g}" if progress.images else "0 (all records exist)"
        print(f"{format_count(progress.done, 'record')} in {out}; encodes per image: {per_image}", file=sys.stderr)
        if progress.more_encodes:
            print(
                f"plus {progress.more_encodes} passes for strategies before or inside the vision tower", file=sys.stderr
            )
    if progress.errors:
        print(
            f"{format_count(progress.errors, 'sample')} failed; the field `error` of their records holds the reason. "
            "Run the same command with --retry-errors to try them again",
            file=sys.stderr,
        )
    return int(progress.errors > 0)


def print_settings(settings: Sequence[Setting]) -> None:
    """Print the scores of settings on stdout.

    Args:
        settings: the settings with their records.
    """
    from tokenprune.experiments.analysis.report import print_results  # matplotlib would slow down the help

    print_results([setting for setting in settings if setting.records], Console())
