"""The scripts in `examples/` run with the commands of their first lines."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

from tokenprune.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "batch_of_images.py": ([], "100 of 500 tokens"),
    "compare_strategies.py": (["--boards", "1", "--budgets", "[0.2]", "--out", "runs"], "report.md"),
    "compose_strategies.py": ([], "HiRED+FastV"),
    "mix_components.py": ([], "MaxMinDiversitySelection.png"),
    "quickstart.py": (["--budget", "0.1"], "50 tokens asked, 50 kept"),
}
"""Scripts with the options of a short run, and a text that each of them prints."""
STRATEGY = "write_a_strategy.py"
"""A file with a strategy, for the command line."""


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*EXPECTED, STRATEGY}


def test_examples_have_at_most_forty_lines() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path


@pytest.mark.parametrize("name", EXPECTED)
def test_examples_run(
    name: str, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script runs in this process, to save the time of imports."""
    options, expected = EXPECTED[name]
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert expected in capsys.readouterr().out


def test_the_strategy_meets_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{EXAMPLES / STRATEGY}:LayerChange", "--families", "llava_next"]) == 0
    assert "LayerChange meets the contract" in capsys.readouterr().out


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
