"""A task of lmms-eval, a file of strategies, and fixtures that run the command line and the plug-in."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.lmms_task import NUMBER, ONE_PROCESS, STRATEGIES, TASK, UTILS, Evaluate
from tokenprune.experiments.evaluation.tasks import Boards
from tokenprune.models import mini


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a task of ten questions about boards and a file of strategies, and return their folder."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed")
    folder = tmp_path_factory.mktemp("lmms")
    (folder / "task").mkdir()
    lines = []
    # Every fifth sample: the questions are about several boards with different image shapes.
    for number, sample in enumerate(list(Boards(number=4).samples())[::5][:NUMBER]):
        sample.image().save(folder / f"{number}.png")
        line = {"image": str(folder / f"{number}.png"), "question": sample.question, "answer": sample.answers[0]}
        lines.append(json.dumps(line))
    assert len(lines) == NUMBER
    (folder / "questions.jsonl").write_text("\n".join(lines))
    (folder / "task" / "boards_local.yaml").write_text(TASK.format(data=folder / "questions.jsonl"))
    (folder / "task" / "utils.py").write_text(UTILS)
    (folder / "mine.py").write_text(STRATEGIES)
    return folder


@pytest.fixture(scope="module")
def evaluate(folder: Path) -> Evaluate:
    """Return a function that runs the command line of lmms-eval; equal calls return the stored result."""
    results: dict[Any, SimpleNamespace] = {}
    numbers = itertools.count()

    def run(model: str, arguments: str, *options: str, launcher: tuple[str, ...] = ONE_PROCESS) -> SimpleNamespace:
        key = (model, arguments, options, launcher)
        if key in results and "--use_cache" not in options:
            return results[key]
        out = folder / f"out{next(numbers)}"
        command = [*launcher, "-m", "lmms_eval", "--model", model, "--tasks", "boards_local", "--log_samples", *options]
        command += ["--model_args", f"pretrained={mini.path()},dtype=float32,{arguments}"]
        command += ["--include_path", str(folder / "task"), "--output_path", str(out)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "ACCELERATE_USE_CPU": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
        process = subprocess.run(
            [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=200
        )
        result = SimpleNamespace(
            code=process.returncode, text=process.stdout + process.stderr, answers=None, results=None
        )
        for file in out.rglob("*_results.json"):  # the exit code does not show a failure, a missing file does
            result.results = json.loads(file.read_text())
        for file in out.rglob("*_samples_*.jsonl"):
            samples = [json.loads(line) for line in file.read_text().splitlines()]
            result.answers = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
        results[key] = result
        return result

    return run


@pytest.fixture
def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Enter the folder of the strategies, and return the module of the plug-in."""
    from tokenprune.experiments.integrations.lmms_eval import model

    monkeypatch.chdir(folder)
    return model
