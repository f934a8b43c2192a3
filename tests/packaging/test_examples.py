"""The scripts in `examples/` run with the commands of their first lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = {
    "quickstart.py": (["--out", "kept.png"], "kept.png"),
    "write_a_strategy.py": (None, "LayerChange"),
    "compare_strategies.py": (["--boards", "1", "--budgets", "[0.2]", "--out", "runs"], "report.md"),
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_run(name: str, tmp_path: Path) -> None:
    options, expected = COMMANDS[name]
    file = str(EXAMPLES / name)
    command = (
        ["-m", "tokenprune", "check", f"{file}:LayerChange", "--families", "llava_next"]
        if options is None
        else [file, *options]
    )
    result = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert expected in result.stdout
