"""The scripts in `examples/` run with the commands of their first lines."""

from __future__ import annotations

import importlib.util
import json
import runpy
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

SHORT = {
    "compose_strategies.py": "HiRED+FastV",
    "mix_components.py": "MaxMinDiversitySelection.png",
    "batch_of_images.py": "100 of 500 tokens",
}
"""Scripts without options, which run in this process to save the time of imports; each with a text that it prints."""


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == COMMANDS.keys() | SHORT.keys()


def test_short_examples_have_at_most_forty_lines() -> None:
    for name in (*SHORT, "write_a_strategy.py"):
        assert len((EXAMPLES / name).read_text().splitlines()) <= 40, name


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


@pytest.mark.parametrize("name", SHORT)
def test_short_examples_run(name: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SHORT[name] in capsys.readouterr().out


def test_notebook_runs(tmp_path: Path) -> None:
    """All cells run without an error, and tables and overlays are displayed."""
    if any(importlib.util.find_spec(name) is None for name in ("nbclient", "nbformat", "ipykernel")):
        pytest.skip('needs the extra "notebook"')
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [kind for output in outputs for kind in output.get("data", {})]
    assert data.count("text/html") >= 4
    assert data.count("image/png") >= 2
    assert not [output for output in outputs if output.output_type == "error"]


def test_notebook_is_stored_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
