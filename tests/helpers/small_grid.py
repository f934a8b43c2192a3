"""The config of a small ablation, a function that starts it, and functions that read its records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tokenprune.experiments.evaluation.records import read_lines

SMALL: dict[str, Any] = {
    "model": "mini",
    "task": {"class_path": "boards", "init_args": {"number": 2}},
    "batch_size": 32,
    "max_new_tokens": 4,
    "reducer": "HiRED",
    "grid": {
        "reducer.budget": [0.05, 0.2],
        "reducer.selection": [
            "TopAttentionSelection",
            {"class_path": "TopAttentionSelection", "init_args": {"layer": "first"}},
        ],
    },
}


def write_config(config: dict[str, Any], name: str = "small.yaml") -> str:
    """Write a config to the working directory and return its path."""
    Path(name).write_text(yaml.safe_dump(config))
    return name


def records(out: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of a run directory, by the hash of their setting."""
    return {
        setting.name: list(read_lines(setting / "records.jsonl")) for setting in sorted(Path(out, "settings").iterdir())
    }


def remove_times(settings: dict[str, list[dict[str, Any]]]) -> Any:
    """Return the records without their durations."""
    return {
        name: [{key: value for key, value in row.items() if not key.endswith("_ms")} for row in rows]
        for name, rows in settings.items()
    }


def start(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start `tokenprune ablate` in another process."""
    command = [sys.executable, "-m", "tokenprune", "ablate", *arguments, "--quiet"]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
