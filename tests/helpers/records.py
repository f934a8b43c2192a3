"""Records and run directories for tests, written without running an experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tokenprune.experiments.analysis.results import Setting, shorten_value

MODEL, TASK = "mini", {"class_path": "tokenprune.tasks.Boards", "init_args": {"number": 2}}


def record(board: int, question: int, score: float, **more: Any) -> dict[str, Any]:
    """Return a record in the form that experiments write."""
    return {
        "sample": f"boards/{board}/{question}",
        "group": f"boards/{board}",
        "question": "What number is on the red star?",
        "answer": "36",
        "prediction": "36" if score == 1 else "17",
        "score": score,
        "correct": score == 1,
        "type": ("number", "side")[question % 2],
        "split": "tiles",
        "asked": 40,
        "kept": 40,
        "valid": 400,
        "kept_per_tile": [10, 10, 20],
        "newlines": 4,
        "prompt_length": 60,
        "prompt_length_full": 440,
        "encode_ms": 8.0,
        "select_ms": 0.5,
        "generate_ms": 20.0,
        "image": f"board-{board}.png",
        "error": None,
    } | more


def failed(board: int, question: int, text: str = "CUDA | out of memory") -> dict[str, Any]:
    """Return the record of a sample that raised an error."""
    return record(board, question, 0.0, prediction="", correct=False, error=text)


def board_records(scores: Sequence[Sequence[float]], **more: Any) -> list[dict[str, Any]]:
    """Return the records of several boards.

    Args:
        scores: for each board, the scores of its questions.
        more: further fields of every record.
    """
    return [record(b, q, score, **more) for b, board in enumerate(scores) for q, score in enumerate(board)]


def write_setting(
    directory: Path,
    records: Sequence[Mapping[str, Any]],
    strategy: str = "HiRED",
    budget: float | str | None = 0.1,
    role: str = "grid",
    seed: int = 0,
    factors: Mapping[str, Any] | None = None,
    model: str = MODEL,
    task: Any = TASK,
    tail: str = "",
    **environment: Any,
) -> Path:
    """Write one setting of a run directory; `tail` is an incomplete line at the end of its records."""
    factors = {"reducer.budget": budget} if factors is None and role != "full" else factors or {}
    number = len(list((directory / "settings").glob("*"))) if directory.exists() else 0
    folder = directory / "settings" / f"{number:012x}"
    folder.mkdir(parents=True)
    labels = [f"{key.split('.')[-1]}={shorten_value(value)}" for key, value in factors.items()]
    metadata = {"name": ", ".join([strategy, *labels]), "factors": factors, "strategy": strategy, "budget": budget}
    metadata |= {"role": role, "seed": seed, "metric": "accuracy", "hash": folder.name}
    reducer = {"class_path": f"tokenprune.strategies.{strategy}", "init_args": {"budget": budget}}
    config = {"model": model, "reducer": reducer, "task": task, "seed": seed, "max_new_tokens": 4}
    (folder / "setting.json").write_text(json.dumps(metadata))
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "device": "cpu", "dtype": "float32"}))
    (folder / "environment.json").write_text(
        json.dumps(
            {"tokenprune": "0.1.0", "device": "cpu", "commit": None, "started": "2026-01-01T00:00:00"} | environment
        )
    )
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records) + tail)
    return folder


def setting(records: Sequence[Mapping[str, Any]], **more: Any) -> Setting:
    """Return a setting with records, without a run directory."""
    metadata: dict[str, Any] = {"hash": "0", "name": "X", "strategy": "X", "budget": 0.1, "records": records}
    return Setting(**(metadata | more))
