"""Tracks experiments on Weights & Biases: one experiment while it runs, or a finished ablation from its records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tokenprune.experiments.analysis.results import shorten_value
from tokenprune.experiments.evaluation.experiment import Progress, Setting, run_settings
from tokenprune.experiments.evaluation.records import list_record_files, read_lines
from tokenprune.experiments.evaluation.stored_images import IMAGES, selection_from_record
from tokenprune.experiments.tracking.tracker import Tracker, track_run
from tokenprune.selection import Selection

OVERLAYS = 4
"""Number of images per experiment whose kept tokens are logged."""


def run_tracked(
    setting: Setting,
    out: Path,
    project: str | None,
    rank: int,
    world: int,
    on_progress: Callable[[Progress], None],
    images: int = IMAGES,
) -> Progress:
    """Run one experiment, track it with images of the kept tokens, and return its progress.

    Args:
        setting: the experiment.
        out: the run directory.
        project: W&B project; None disables tracking.
        rank: index of this process; only process 0 tracks.
        world: number of processes.
        on_progress: called after every record.
        images: number of images that are stored for reports.
    """
    if project is None or rank:
        return run_settings([setting], out, rank, world, on_progress, images=images)
    with track_run(project, **_options(setting.describe(), setting.experiment.config(), out, "evaluate")) as tracker:
        drawn: set[str] = set(_replay(tracker, setting.folder(out)))

        def on_record(setting: Setting, record: Mapping[str, Any], selection: Selection | None) -> None:
            tracker.log_record(record)
            image = str(record["group"])
            if selection is not None and selection.pixels is not None and image not in drawn and len(drawn) < OVERLAYS:
                drawn.add(image)
                tracker.log_overlay(image, selection)

        progress = run_settings([setting], out, rank, world, on_progress, on_record, images)
        tracker.log_pareto(_read_points(out)[_context_key(setting.experiment.config())])
        tracker.finish({}, _files(setting.folder(out)))
    return progress


def publish(out: Path, project: str) -> int:
    """Upload all experiments of a run directory from their records, and a summary run with the Pareto plots.

    Args:
        out: the run directory.
        project: W&B project.

    Returns:
        Number of experiments.
    """
    folders = _list_folders(out)
    for folder in folders:
        metadata, config = _read_metadata(folder)
        with track_run(project, **_options(metadata, config, out, metadata["role"])) as tracker:
            _replay(tracker, folder)
            _log_overlays(tracker, out, folder)
            tracker.finish({}, _files(folder))
    summary = {"group": out.name, "job_type": "summary", "name": f"{out.name} summary", "directory": out.resolve()}
    by_context = _read_points(out)
    with track_run(project, **summary) as tracker:
        for number, points in enumerate(by_context.values(), start=1):
            tracker.log_pareto(points, "pareto" if len(by_context) == 1 else f"pareto-{number}")
        tracker.finish({}, [file for file in [out / "ablation.yaml"] if file.is_file()])
    return len(folders)


def _list_folders(out: Path) -> list[Path]:
    return sorted(file.parent for file in (out / "settings").glob("*/setting.json"))


def _read_metadata(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata (names, role and factors) of an experiment, and its configuration."""
    return json.loads((folder / "setting.json").read_text()), yaml.safe_load((folder / "config.yaml").read_text())


def _read_points(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return mean kept tokens and score of all experiments, by context (model and task).

    Only experiments of the same context are comparable.
    """
    by_context: dict[str, list[dict[str, Any]]] = {}
    for folder in _list_folders(out):
        metadata, config = _read_metadata(folder)
        rows = [row for file in list_record_files(folder) for row in read_lines(file) if row["error"] is None]
        points = by_context.setdefault(_context_key(config), [])
        if rows:
            kept, score = (sum(row[name] for row in rows) / len(rows) for name in ("kept", "score"))
            model, task = str(config["model"]), shorten_value(config["task"])
            points.append({"name": metadata["name"], "kept": kept, "score": score, "model": model, "task": task})
    return by_context


def _context_key(config: Mapping[str, Any]) -> str:
    return json.dumps([config["model"], config["task"]], sort_keys=True)


def _log_overlays(tracker: Tracker, out: Path, folder: Path) -> None:
    """Log the kept tokens of the first stored images, at most `OVERLAYS`."""
    drawn: set[str] = set()
    for record in read_lines(folder / "records.jsonl"):
        if len(drawn) == OVERLAYS:
            return
        image = str(record["group"])
        selection = None if image in drawn else selection_from_record(out, record)
        if selection is not None:
            drawn.add(image)
            tracker.log_overlay(image, selection)


def _options(metadata: Mapping[str, Any], config: Mapping[str, Any], out: Path, job_type: str) -> dict[str, Any]:
    """Return the arguments of `track_run` for one experiment."""
    tags = [metadata["strategy"], metadata["role"], str(config["model"]).rpartition("/")[2]]
    return {
        "name": metadata["name"],
        "group": out.name,
        "tags": tags,
        "job_type": job_type,
        "config": {**config, "hash": metadata["hash"], "factors": metadata["factors"]},
        "directory": out.resolve(),  # the process of wandb can have another working directory
    }


def _replay(tracker: Tracker, folder: Path) -> list[str]:
    """Log the existing records of an experiment, and return the group (image) of each record."""
    groups = []
    for record in read_lines(folder / "records.jsonl"):
        tracker.log_record(record)
        groups.append(str(record["group"]))
    return groups


def _files(folder: Path) -> list[Path]:
    names = ("config.yaml", "setting.json", "environment.json", "records.jsonl")
    return [folder / name for name in names if (folder / name).is_file()]
