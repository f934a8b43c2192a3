"""Experiments on Weights & Biases: one while it runs, and those of an ablation from their records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tokenprune.experiments.analysis.stats import short
from tokenprune.experiments.evaluation.experiment import Progress, Setting, run_settings
from tokenprune.experiments.evaluation.records import files_of, read_lines
from tokenprune.experiments.evaluation.stored_images import IMAGES, from_record
from tokenprune.experiments.tracking.tracker import Tracker, tracked
from tokenprune.selection import Selection

OVERLAYS = 4
"""Images of an experiment whose kept tokens are drawn."""


def run_tracked(
    setting: Setting,
    out: Path,
    project: str | None,
    rank: int,
    world: int,
    tell: Callable[[Progress], None],
    images: int = IMAGES,
) -> Progress:
    """Run one experiment and track it, with images of the kept tokens.

    Args:
        setting: the experiment.
        out: the run directory.
        project: W&B project; None tracks nothing.
        rank: number of this process; only the first one tracks.
        world: number of processes.
        tell: is told after every record.
        images: so many images are stored for reports.
    """
    if project is None or rank:
        return run_settings([setting], out, rank, world, tell, images=images)
    with tracked(project, **_options(setting.describe(), setting.experiment.config(), out, "evaluate")) as tracker:
        before = _replay(tracker, setting.folder(out))
        drawn: set[str] = set(before)

        def watch(setting: Setting, record: Mapping[str, Any], selection: Selection | None) -> None:
            tracker.record(record)
            image = str(record["group"])
            if selection is not None and selection.pixels is not None and image not in drawn and len(drawn) < OVERLAYS:
                drawn.add(image)
                tracker.overlay(image, selection)

        progress = run_settings([setting], out, rank, world, tell, watch, images)
        tracker.pareto(_points(out)[_setting(setting.experiment.config())])
        tracker.finish({}, _files(setting.folder(out)))
    return progress


def publish(out: Path, project: str) -> int:
    """Track all experiments of a run directory from their records, and the plot of all of them.

    Args:
        out: the run directory.
        project: W&B project.

    Returns:
        Number of experiments.
    """
    folders = _folders(out)
    for folder in folders:
        said, config = _about(folder)
        with tracked(project, **_options(said, config, out, said["role"])) as tracker:
            _replay(tracker, folder)
            _draw(tracker, out, folder)
            tracker.finish({}, _files(folder))
    whole = {"group": out.name, "job_type": "summary", "name": f"{out.name} summary", "directory": out.resolve()}
    points = _points(out)
    with tracked(project, **whole) as tracker:
        for number, part in enumerate(points.values(), start=1):
            tracker.pareto(part, "pareto" if len(points) == 1 else f"pareto-{number}")
        tracker.finish({}, [file for file in [out / "ablation.yaml"] if file.is_file()])
    return len(folders)


def _folders(out: Path) -> list[Path]:
    return sorted(file.parent for file in (out / "settings").glob("*/setting.json"))


def _about(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what an experiment is called, and its configuration."""
    return json.loads((folder / "setting.json").read_text()), yaml.safe_load((folder / "config.yaml").read_text())


def _points(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return kept tokens and score of all experiments, those of one model and task together: no others compare."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in _folders(out):
        said, config = _about(folder)
        rows = [row for file in files_of(folder) for row in read_lines(file) if row["error"] is None]
        points = found.setdefault(_setting(config), [])
        if rows:
            kept, score = (sum(row[name] for row in rows) / len(rows) for name in ("kept", "score"))
            model, task = str(config["model"]), short(config["task"])
            points.append({"name": said["name"], "kept": kept, "score": score, "model": model, "task": task})
    return found


def _setting(config: Mapping[str, Any]) -> str:
    return json.dumps([config["model"], config["task"]], sort_keys=True)


def _draw(tracker: Tracker, out: Path, folder: Path) -> None:
    """Give a tracker the kept tokens of the first few images that are stored."""
    drawn: set[str] = set()
    for record in read_lines(folder / "records.jsonl"):
        if len(drawn) == OVERLAYS:
            return
        image = str(record["group"])
        selection = None if image in drawn else from_record(out, record)
        if selection is not None:
            drawn.add(image)
            tracker.overlay(image, selection)


def _options(said: Mapping[str, Any], config: Mapping[str, Any], out: Path, job: str) -> dict[str, Any]:
    tags = [said["strategy"], said["role"], str(config["model"]).rpartition("/")[2]]
    return {
        "name": said["name"],
        "group": out.name,
        "tags": tags,
        "job_type": job,
        "config": {**config, "hash": said["hash"], "factors": said["factors"]},
        "directory": out.resolve(),  # wandb's own process may have another working directory
    }


def _replay(tracker: Tracker, folder: Path) -> list[str]:
    """Give a tracker the records that are there; return their images."""
    groups = []
    for record in read_lines(folder / "records.jsonl"):
        tracker.record(record)
        groups.append(str(record["group"]))
    return groups


def _files(folder: Path) -> list[Path]:
    names = ("config.yaml", "setting.json", "environment.json", "records.jsonl")
    return [folder / name for name in names if (folder / name).is_file()]
