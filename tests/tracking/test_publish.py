"""Experiments on W&B, offline: what the commands leave behind."""

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

from tests.helpers.wandb_runs import forget_account, media, read_back, values
from tokenprune.cli.main import main

CELL: dict[str, Any] = {
    "task": {"class_path": "boards", "init_args": {"number": 1}},
    "batch_size": 32,
    "max_new_tokens": 4,
    "grid": {"reducer.budget": [0.1]},
    "baselines": False,
}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_account(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)


def summaries(out: str, number: int) -> list[dict[str, Any]]:
    """The summaries of the runs that were tracked under a run directory; wandb may write them a little later."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = []
        for file in sorted(Path(out, "wandb").glob("offline-run-*/run-*.wandb")):
            kinds = {record.WhichOneof("record_type"): record for record in read_back(file.parent)}
            summary: dict[str, Any] = {}
            for record in read_back(file.parent):
                if record.WhichOneof("record_type") == "summary":
                    summary |= values(record.summary.update)
            found += [summary] if "exit" in kinds else []
        if len(found) == number:
            return found
        time.sleep(0.1)
    raise AssertionError(f"expected {number} finished runs in {out}, saw {len(found)}")


def whole_runs(out: str, number: int) -> list[SimpleNamespace]:
    """Everything in the finished runs that were tracked under a run directory."""
    summaries(out, number)
    found = []
    for folder in sorted(Path(out, "wandb").glob("offline-run-*")):
        records: dict[str, list[Any]] = {}
        for record in read_back(folder):
            kind = record.WhichOneof("record_type")
            records.setdefault(kind, []).append(getattr(record, kind))
        history = [values(one.item) for one in records.get("history", [])]
        config = values(records["run"][0].config.update)
        for update in records.get("config", []):
            config |= values(update.update)
        found.append(SimpleNamespace(folder=folder, records=records, history=history, config=config))
    return found


def check_experiment(run: SimpleNamespace, job: str) -> None:
    """Look for everything that the run of an experiment holds."""
    assert run.records["run"][0].job_type == job
    assert run.config["reducer"]["init_args"]["budget"] == 0.1
    rules = {one.name or one.glob_name: one.step_metric for one in run.records["metric"]}
    assert rules["eval/*"] == rules["perf/*"] == "eval/tokens_kept"
    (results,) = [row for row in run.history if "eval/score" in row]
    assert results["eval/tokens_kept"] > 0
    assert {"perf/encode_ms", "perf/select_ms", "perf/generate_ms"} <= set(results)
    entry = media(run, "samples/predictions")
    table = json.loads((run.folder / "files" / entry["path"]).read_text())
    assert len(table["data"]) == results["eval/samples"]
    entry = media(run, "vis/selection/boards-1000")
    stored = entry["masks"]["tokens"]["path"] if "masks" in entry else entry["masks.tokens.path"]
    mask = np.asarray(Image.open(run.folder / "files" / stored))
    with Image.open(run.folder / "files" / entry["path"]) as image:
        assert image.size == mask.shape[::-1]
    assert set(np.unique(mask)) >= {0, 1, 2}
    (artifact,) = [one for one in run.records["artifact"] if one.type == "experiment"]
    assert "config.yaml" in [entry.path for entry in artifact.manifest.contents]


def check_pareto(run: SimpleNamespace) -> None:
    table = json.loads((run.folder / "files" / media(run, "vis/pareto_table")["path"]).read_text())
    assert [row[table["columns"].index("front")] for row in table["data"]] == [True]


def test_an_experiment_is_tracked_while_it_runs() -> None:
    words = ["evaluate", "--task", "boards", "--task.number", "1", "--max-new-tokens", "4", "--batch-size", "32"]
    assert main([*words, "--reducer.budget", "0.1", "--out", "out", "--quiet", "--wandb", "p"]) == 0
    (run,) = whole_runs("out", 1)
    check_experiment(run, "evaluate")
    check_pareto(run)


def test_an_ablation_is_published_from_its_records() -> None:
    Path("grid.yaml").write_text(yaml.safe_dump(CELL))
    assert main(["ablate", "grid.yaml", "--out", "out", "--quiet", "--wandb", "p"]) == 0
    one, whole = sorted(whole_runs("out", 2), key=lambda run: run.records["run"][0].job_type)
    check_experiment(one, "grid")
    check_pareto(whole)
    (artifact,) = [one for one in whole.records["artifact"] if one.type == "experiment"]
    assert [entry.path for entry in artifact.manifest.contents] == ["ablation.yaml"]
