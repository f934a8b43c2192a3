"""Runs groups of settings in this process, or in several processes that share the images."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from tokenprune.cli.parsing import format_error
from tokenprune.experiments.evaluation.experiment import (
    Progress,
    Setting,
    run_settings,
)


def run_groups(
    groups: Sequence[Sequence[Setting]],
    out: Path,
    rank: int,
    world: int,
    on_progress: Callable[[Progress], None],
    images: int,
) -> Progress:
    """Run the groups of settings in order, and report their total progress.

    Args:
        groups: settings that share model and task, by group.
        out: the run directory.
        rank: index of this process among the processes that share the samples.
        world: number of these processes.
        on_progress: called with the total progress after every record.
        images: number of images of a model and task that are stored for reports.
    """
    total = Progress(0)
    for group in groups:
        before = total

        def report_total(current: Progress, before: Progress = before) -> None:
            on_progress(_add_progress(before, current))

        total = _add_progress(before, run_settings(group, out, rank, world, report_total, images=images))
    return total


def _add_progress(first: Progress, second: Progress) -> Progress:
    counts = ("total", "done", "errors", "images", "encodes", "more_encodes")
    return Progress(
        **{name: getattr(first, name) + getattr(second, name) for name in counts},
        setting=second.setting or first.setting,
        scores={**first.scores, **second.scores},
    )


def _combine_workers(parts: Sequence[Progress], setting: str) -> Progress:
    """Return the total progress of processes that share the samples of the same settings."""
    total = Progress(0)
    for part in parts:
        total = _add_progress(total, part)
    names = {name for part in parts for name in part.scores}
    pairs = {name: [part.scores.get(name, (0.0, 0)) for part in parts] for name in names}
    scores = {
        name: (sum(score for score, _ in entries), sum(number for _, number in entries))
        for name, entries in pairs.items()
    }
    return replace(total, setting=setting, scores=scores)


LoadGroups: TypeAlias = Callable[[], Sequence[Sequence[Setting]]]
PROGRESS_INTERVAL = 0.2
"""Shortest time between two messages of a worker, in seconds."""


def _run_worker(load_groups: LoadGroups, out: Path, rank: int, world: int, messages: Any, images: int) -> None:
    """Run one worker: send progress to the parent process, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    last = 0.0

    def send_progress(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_INTERVAL:
            messages.put((rank, replace(progress, scores=dict(progress.scores))))
            last = time.monotonic()

    try:
        messages.put((rank, run_groups(load_groups(), out, rank, world, send_progress, images)))
    except Exception as error:
        print(f"tokenprune: worker {rank}: {format_error(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def run_workers(
    load_groups: LoadGroups, out: Path, workers: int, on_progress: Callable[[Progress], None], images: int
) -> Progress:
    """Run groups of settings in several processes; the last one merges their records.

    Args:
        load_groups: returns the groups of settings. Each worker calls it, because classes of plug-ins cannot be sent
            between processes.
        out: the run directory.
        workers: number of processes that share the images.
        on_progress: called with the total progress of all workers.
        images: number of images of a model and task that are stored for reports.

    Raises:
        RuntimeError: if a worker failed.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    processes = [
        context.Process(target=_run_worker, args=(load_groups, out, rank, workers, messages, images), daemon=True)
        for rank in range(workers)
    ]
    progress_by_rank: dict[int, Progress] = {}

    def receive(seconds: float) -> bool:
        """Receive one message; return whether there was one within the time."""
        try:
            rank, progress_by_rank[rank] = messages.get(timeout=seconds)
        except queue.Empty:
            return False
        parts = [progress_by_rank[key] for key in sorted(progress_by_rank)]
        on_progress(_combine_workers(parts, progress_by_rank[rank].setting))
        return True

    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            receive(PROGRESS_INTERVAL)
        while receive(PROGRESS_INTERVAL):
            pass
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"workers ended with {codes}; their messages are above. Run the same command to continue")
    return _combine_workers([progress_by_rank[rank] for rank in sorted(progress_by_rank)], "")
