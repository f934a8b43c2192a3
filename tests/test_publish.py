"""Experiments on W&B, offline: what the commands leave behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_tracking import forget_account, read_back, values
from tokenprune.cli import main

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


def test_an_experiment_is_tracked_while_it_runs() -> None:
    words = ["evaluate", "--task", "boards", "--task.number", "1", "--max-new-tokens", "4", "--batch-size", "32"]
    assert main([*words, "--reducer.budget", "0.1", "--out", "out", "--quiet", "--wandb", "p"]) == 0
    (summary,) = summaries("out", 1)
    assert summary["eval/score"] > 0.5
    assert summary["eval/tokens_kept"] > 0
    assert list(Path("out/wandb").glob("offline-run-*/files/media/images/**/*.png"))


def test_an_ablation_is_published_from_its_records() -> None:
    Path("grid.yaml").write_text(yaml.safe_dump(CELL))
    assert main(["ablate", "grid.yaml", "--out", "out", "--quiet", "--wandb", "p"]) == 0
    one, whole = sorted(summaries("out", 2), key=lambda summary: "eval/score" not in summary)
    assert one["eval/score"] > 0.5
    assert any(key.startswith("vis/pareto") for key in whole)
