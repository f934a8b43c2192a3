"""W&B runs that `evaluate` and `ablate` write offline."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.helpers.wandb_runs import hide_account, media, read_records, values
from tokenprune.cli.main import main

GRID: dict[str, Any] = {
    "task": {"class_path": "boards", "init_args": {"number": 1}},
    "batch_size": 32,
    "max_new_tokens": 4,
    "grid": {"reducer.budget": [0.1]},
    "baselines": False,
}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_account(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)


def read_summaries(out: str, number: int) -> list[dict[str, Any]]:
    """Return the summaries of the finished runs under a run directory; wandb may write them with a delay."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        finished = []
        for file in sorted(Path(out, "wandb").glob("offline-run-*/run-*.wandb")):
            record_types = {record.WhichOneof("record_type"): record for record in read_records(file.parent)}
            summary: dict[str, Any] = {}
            for record in read_records(file.parent):
                if record.WhichOneof("record_type") == "summary":
                    summary |= values(record.summary.update)
            finished += [summary] if "exit" in record_types else []
        if len(finished) == number:
            return finished
        time.sleep(0.1)
    raise AssertionError(f"expected {number} finished runs in {out}, got {len(finished)}")


def read_runs(out: str, number: int) -> list[SimpleNamespace]:
    """Return records, history and configuration of each finished run under a run directory."""
    read_summaries(out, number)
    runs = []
    for folder in sorted(Path(out, "wandb").glob("offline-run-*")):
        records: dict[str, list[Any]] = {}
        for record in read_records(folder):
            kind = record.WhichOneof("record_type")
            records.setdefault(kind, []).append(getattr(record, kind))
        history = [values(record.item) for record in records.get("history", [])]
        config = values(records["run"][0].config.update)
        for update in records.get("config", []):
            config |= values(update.update)
        runs.append(SimpleNamespace(folder=folder, records=records, history=history, config=config))
    return runs


def check_experiment(run: SimpleNamespace, job_type: str) -> None:
    """Check the configuration, metrics, table, overlay and artifact of the run of an experiment."""
    assert run.records["run"][0].job_type == job_type
    assert run.config["reducer"]["init_args"]["budget"] == 0.1
    step_metrics = {record.name or record.glob_name: record.step_metric for record in run.records["metric"]}
    assert step_metrics["eval/*"] == step_metrics["perf/*"] == "eval/tokens_kept"
    (results,) = [row for row in run.history if "eval/score" in row]
    assert results["eval/tokens_kept"] > 0
    assert {"perf/encode_ms", "perf/select_ms", "perf/generate_ms"} <= set(results)
    entry = media(run, "samples/predictions")
    table = json.loads((run.folder / "files" / entry["path"]).read_text())
    assert len(table["data"]) == results["eval/samples"]
    entry = media(run, "vis/selection/boards-1000")
    mask_path = entry["masks"]["tokens"]["path"] if "masks" in entry else entry["masks.tokens.path"]
    mask = np.asarray(Image.open(run.folder / "files" / mask_path))
    with Image.open(run.folder / "files" / entry["path"]) as image:
        assert image.size == mask.shape[::-1]
    assert set(np.unique(mask)) >= {0, 1, 2}
    (artifact,) = [record for record in run.records["artifact"] if record.type == "experiment"]
    assert "config.yaml" in [entry.path for entry in artifact.manifest.contents]


def check_pareto(run: SimpleNamespace) -> None:
    table = json.loads((run.folder / "files" / media(run, "vis/pareto_table")["path"]).read_text())
    assert [row[table["columns"].index("front")] for row in table["data"]] == [True]


def test_an_experiment_is_tracked_while_it_runs() -> None:
    command = ["evaluate", "--task", "boards", "--task.number", "1", "--max-new-tokens", "4", "--batch-size", "32"]
    assert main([*command, "--reducer.budget", "0.1", "--out", "out", "--quiet", "--wandb", "p"]) == 0
    (run,) = read_runs("out", 1)
    check_experiment(run, "evaluate")
    check_pareto(run)


def test_an_ablation_is_published_from_its_records() -> None:
    Path("grid.yaml").write_text(yaml.safe_dump(GRID))
    assert main(["ablate", "grid.yaml", "--out", "out", "--quiet", "--wandb", "p"]) == 0
    setting_run, ablation_run = sorted(read_runs("out", 2), key=lambda run: run.records["run"][0].job_type)
    check_experiment(setting_run, "grid")
    check_pareto(ablation_run)
    (artifact,) = [record for record in ablation_run.records["artifact"] if record.type == "experiment"]
    assert [entry.path for entry in artifact.manifest.contents] == ["ablation.yaml"]
