"""The scripts for a GPU on the embedded model and a CPU, and the page of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from research.gpu import checks, count_operators, profile_calls
from research.gpu.report import FOLDER, build_page, format_operators
from tests.helpers.pages import parse_command
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.experiments.bench.command import BenchConfig
from tokenprune.strategies import HiRED

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "research/gpu/run.sh"
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


def test_counts_of_operators_replace_those_after_and_keep_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, keys = tmp_path / "operators.json", ("images", "newlines", "strategy")
    earlier = {"operators": 159, "reads": 28}
    old = {**dict(zip(keys, (1, "keep_rows", "HiRED"), strict=True)), "before": earlier, "after": {"operators": 7}}
    file.write_text(json.dumps({"counts": [old]}))
    monkeypatch.setattr(count_operators, "IMAGES", (1,))
    monkeypatch.setattr(count_operators, "STRATEGIES", {"HiRED": HiRED})
    assert count_operators.main(["--out", str(file)]) == 0
    result = json.loads(file.read_text())
    counts = {entry["newlines"]: entry for entry in result["counts"]}
    assert list(counts) == ["keep_rows", "drop", "keep"]
    assert [entry.get("before") for entry in counts.values()] == [earlier, None, None]
    (plain,) = result["plain"]
    assert 0 < counts["drop"]["after"]["operators"] < counts["keep_rows"]["after"]["operators"] < plain["operators"]
    reads = [plain["reads"] + counts[newlines]["after"]["reads"] for newlines in ("drop", "keep_rows")]
    assert 0 <= reads[0] <= reads[1] <= plain["reads"] + 1
    table = format_operators(result["counts"]).splitlines()
    assert len(table) == 3
    assert table[0].split(" | ")[2:6] == ["operators before", *(f"operators, {name}" for name in counts)]


def test_the_strategies_of_the_page_are_counted() -> None:
    recorded = json.loads((FOLDER / "operators.json").read_text())
    strategies = {entry["strategy"] for entry in recorded["counts"]}
    assert strategies <= set(count_operators.STRATEGIES)
    assert [entry["images"] for entry in recorded["plain"]] == list(count_operators.IMAGES)


def record_commands(folder: Path, **variables: str) -> list[list[str]]:
    """Return the arguments of each call of Python by the script, which runs none of them.

    Args:
        folder: the output folder of the script.
        variables: environment variables of the script.
    """
    program, log = folder / "python", folder / "log"
    program.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" $'\\n' >> '{log}'\n")
    program.chmod(0o755)
    log.unlink(missing_ok=True)
    environment = {**os.environ, **variables, "PYTHON": str(program)}
    result = subprocess.run([str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [line.rstrip("\0").split("\0") for line in log.read_text().split("\n\0") if line]


def read_option(command: list[str], name: str) -> list[str]:
    """Return the values of an option of a command."""
    values = command[command.index(name) + 1 :]
    return values[: next((number for number, value in enumerate(values) if value.startswith("--")), len(values))]


def test_the_commands_of_the_script_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tests, *commands = record_commands(tmp_path)
    assert tests[:4] == ["-m", "pytest", "-m", "gpu"]
    assert all(Path(file).is_file() for file in tests[6:])
    for command in commands:
        parse_command(["python", *command])
    modules = ["research.gpu.checks", "tokenprune", "tokenprune", "tokenprune", "research.gpu.profile_calls"]
    assert [command[1] for command in commands] == modules
    assert [read_option(command, "--batches") for command in commands[1:]] == [["1", "8"], ["1"], ["8"], ["1"]]
    assert ["--compile" in command for command in commands] == [False, False, True, True, True]


def test_steps_of_the_script_can_be_selected(tmp_path: Path) -> None:
    (command,) = record_commands(tmp_path, STEPS="compiled", COMPILED_BATCHES="8")
    assert read_option(command, "--batches") == ["8"]
    assert read_option(command, "--out") == [str(tmp_path / "bench-compiled-8")]
    checked, profiled = record_commands(tmp_path, STEPS="checks profile", PROFILE_BATCHES="1 8")
    assert (checked[1], profiled[1]) == ("research.gpu.checks", "research.gpu.profile_calls")
    assert read_option(profiled, "--batches") == ["1", "8"]
    steps = (tmp_path / "steps.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in steps] == ["compiled-8", "checks", "profile"]


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "DEVICE": "cpu",
        "MODEL": "mini",
        "SIZE": "80x160",
        "BATCHES": "1",
        "COMPILED_BATCHES": "1",
        "PYTHON": sys.executable,
    }
    command = [str(SCRIPT), str(tmp_path), "--repeats", "1", "--tokens", "2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    steps = (tmp_path / "steps.txt").read_text().splitlines()
    assert [line.partition(", ")[0] for line in steps] == [
        f"{name}: exit code 0" for name in ("tests", "checks", "table", "compiled-1", "profile")
    ]
    assert result.returncode == 0
    names = ("checks.json", "bench/bench.json", "bench-compiled-1/bench.json", "profile/profile.json")
    assert all((tmp_path / name).is_file() for name in names)
