"""The scripts for a GPU on the embedded model and a CPU, and the page of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from research.gpu import checks, profile_calls
from research.gpu.report import build_page
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.experiments.bench.command import BenchConfig

ROOT = Path(__file__).parents[2]
ON_A_CPU = ["--device", "cpu", "--model", "mini", "--size", "80x160"]


def test_checks_pass_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checks.main([*ON_A_CPU, "--out", str(tmp_path / "checks.json")]) == 0
    result = json.loads((tmp_path / "checks.json").read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["passed"]
    assert set(result["identical_logits"]) == {
        "plain",
        *(f"{name} 100 %" for name in ("HiRED", "FasterVLM", "VisionZip", "DivPrune")),
    }
    assert {"eager", "math", "flash"} <= set(result["kernels"])
    assert all(kernel["common_share"] == [1.0, 1.0] for kernel in result["kernels"].values())
    assert set(result["kernels"]) | set(result["unavailable_kernels"]) == {checks.EAGER, *checks.BACKENDS}


def test_a_wrong_number_and_a_small_share_of_tokens_fail() -> None:
    eager = torch.tensor([[True, True, True, True, False, False]])
    swapped = torch.tensor([[True, True, True, False, True, False]])
    smaller = torch.tensor([[True, True, True, False, False, False]])
    masks = {checks.EAGER: [eager], "math": [swapped], "flash": [smaller]}
    results = checks.compare_kernels(masks, minimum_share=0.75)
    assert {name: result["passed"] for name, result in results.items()} == {
        "eager": True,
        "math": True,
        "flash": False,
    }
    assert results["math"]["common_share"] == [0.75]
    assert not checks.compare_kernels(masks, minimum_share=0.76)["math"]["passed"]


def test_a_strategy_that_changes_logits_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "compare_with_plain", lambda model, inputs: {"plain": True, "HiRED 100 %": False})
    assert checks.main([*ON_A_CPU, "--out", str(tmp_path / "checks.json")]) == 1


def test_calls_are_profiled_on_a_cpu(tmp_path: Path) -> None:
    assert profile_calls.main([*ON_A_CPU, "--batches", "1", "2", "--out", str(tmp_path)]) == 0
    calls = json.loads((tmp_path / "profile.json").read_text())["calls"]
    assert [(call["batch"], call["variant"]) for call in calls] == [
        (batch, name) for batch in (1, 2) for name in ("plain", "release-like 20 %", "HiRED 20 %")
    ]
    operators = [call["launches"]["dispatched operators"] for call in calls]
    assert operators[0] < operators[1]  # the baseline selects tokens in addition
    assert all(call["wall_ms"] > 0 for call in calls)
    assert "aten::addmm" in (tmp_path / "batch-2-HiRED-20-percent.txt").read_text()


@pytest.mark.slow
def test_compiled_calls_are_profiled_on_a_cpu(tmp_path: Path) -> None:
    assert profile_calls.main([*ON_A_CPU, "--batches", "1", "--compile", "true", "--out", str(tmp_path)]) == 0
    call = json.loads((tmp_path / "profile.json").read_text())["calls"][-1]
    assert (call["variant"], call["launches"]) == ("HiRED 20 % compiled", {})
    assert call["wall_ms"] > 0


def test_the_config_of_the_table_is_valid() -> None:
    parser = build_parser("tokenprune bench run", "", BenchConfig, file=True)
    options = parse_options(parser, ["--config", str(ROOT / "research/gpu/llava_next_7b.yaml")])
    config = select_fields(BenchConfig, options)
    assert (config.batches, config.budget) == ([1, 8], [1.0, 0.2, 0.0556])
    assert (config.baseline, config.count) == ("release", True)


def test_the_page_shows_the_recorded_numbers() -> None:
    """To update the page, run ``python -m research.gpu.report > docs/results/gpu.md``."""
    assert (ROOT / "docs/results/gpu.md").read_text() == build_page()


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "DEVICE": "cpu",
        "MODEL": "mini",
        "SIZE": "80x160",
        "BATCHES": "1",
        "PYTHON": sys.executable,
    }
    command = [str(ROOT / "research/gpu/run.sh"), str(tmp_path), "--repeats", "1", "--tokens", "2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    steps = (tmp_path / "steps.txt").read_text().splitlines()
    assert [line.partition(", ")[0] for line in steps] == [
        f"{name}: exit code 0" for name in ("tests", "checks", "table", "compiled", "profile")
    ]
    assert result.returncode == 0
    names = ("checks.json", "bench/bench.json", "bench-compiled/bench.json", "profile/profile.json")
    assert all((tmp_path / name).is_file() for name in names)
