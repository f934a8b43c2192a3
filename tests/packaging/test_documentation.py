"""README and documentation: code runs, commands are valid exactly as printed, and tables agree with the code."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.helpers.pages import (
    COMPARED,
    ROOT,
    enter_folder,
    expand_commands,
    needs_other_machines,
    parse_command,
    read_blocks,
    read_inline_commands,
    read_python,
)
from tests.helpers.reports import write_run_directory
from tokenprune.cli.listing import as_markdown, model_rows, strategy_rows
from tokenprune.cli.main import main
from tokenprune.cli.options import parse_reducer
from tokenprune.experiments.evaluation.grid import expand

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if path != ROOT / "docs/results/components/report.md"  # written by `tokenprune report`
)
PYTHON_PAGES = [page for page in PAGES if read_python(page)]
COMMAND_PAGES = [page for page in PAGES if any(block.language == "bash" for block in read_blocks(page))]
HOME = "docs/index.md"
CONTINUES_HOME = "first block of the [home page]"
"""Words of a page whose code continues the first block of the home page."""
COMPILING_PAGE = "docs/how-to/compile.md"
ADAPTER_PAGE = "docs/how-to/write-an-adapter.md"
"""This page registers an adapter, which a process cannot remove. Its blocks run in a process of their own."""
EXPECTED = {
    "docs/how-to/write-an-adapter.md": 3,
    "docs/how-to/own-components.md": 5,
    "docs/tutorials/first-reduction.md": 4,
    "docs/tutorials/own-strategy.md": 3,
    "README.md": 3,
    HOME: 2,
}
"""Numbers of Python blocks of some pages, so that a change of their format cannot hide them."""


def run_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the Python blocks of a page in order in a folder, and return their variables."""
    monkeypatch.chdir(folder)
    enter_folder(page, folder)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # classes of the page look up their module
    text = " ".join((ROOT / page).read_text().split())
    first = read_python(HOME)[:1] if CONTINUES_HOME in text else []
    for block in [*first, *read_python(page)]:
        exec(compile(block, page, "exec"), vars(module))
    return vars(module)


def test_every_block_names_its_language() -> None:
    languages = {block.language for page in PAGES for block in read_blocks(page)}
    assert languages == {"bash", "bibtex", "json", "python", "text", "toml", "yaml"}
    assert {page: len(read_python(page)) for page in EXPECTED} == EXPECTED


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page == COMPILING_PAGE else ())
        for page in PYTHON_PAGES
        if page != ADAPTER_PAGE
    ],
)
def test_code_of_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run in order. Pages about records find an ablation with a known result."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_run_directory(tmp_path / "runs/first")
    run_page(page, tmp_path, monkeypatch)


def test_code_of_the_page_about_adapters_runs(tmp_path: Path) -> None:
    code = "\n".join(read_python(ADAPTER_PAGE))
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_valid(page: str, in_empty_folder: Path) -> None:
    """The parser of its program accepts each command, and the files that it reads exist."""
    script = "\n".join(block.text for block in read_blocks(page) if block.language == "bash")
    commands = expand_commands(script, in_empty_folder / "stubs")
    enter_folder(page, in_empty_folder)
    for words in [*commands, *map(shlex.split, read_inline_commands(page))]:
        parse_command(words)


@pytest.mark.parametrize("page", [page for page in COMMAND_PAGES if COMPARED in (ROOT / page).read_text()])
def test_compared_settings_exist(page: str, tmp_path: Path) -> None:
    """The names after ``--compare`` are settings of a grid that the page shows."""
    grids = [yaml.safe_load(block.text) for block in read_blocks(page) if block.file.endswith(".yaml")]
    names = {setting.name for grid in grids for setting in expand(grid)}
    script = "\n".join(block.text for block in read_blocks(page) if block.language == "bash")
    reports = [words for words in expand_commands(script, tmp_path / "stubs") if COMPARED in words]
    assert reports
    for words in reports:
        position = words.index(COMPARED)
        assert set(words[position + 1 : position + 3]) <= names


def test_an_invalid_command_is_found(in_empty_folder: Path) -> None:
    """The tests above fail for a wrong option, a missing file, an unknown program and a broken shell line."""
    for number, (line, message) in enumerate(
        (
            ("tokenprune evaluate --task folder --task.path a --task.score-by anls", "score-by"),
            ("tokenprune ablate missing.yaml", "no such file"),
            ("python -m research.heldout --boards 3", "2"),
            ("wandb login", "wandb"),
            ('pip install -e ".[typo]"', "typo"),
        )
    ):
        (words,) = expand_commands(line, in_empty_folder / str(number))
        with pytest.raises(BaseException, match=message):  # the modules of `research` exit
            parse_command(words)
    for line in ("tokenprune 'run", "unknown-program"):
        with pytest.raises(AssertionError):
            expand_commands(line, in_empty_folder / line[-4:])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_commands_run(page: str, tmp_path: Path) -> None:
    """All commands of a page run in order, except those that need a GPU, the hub or a server."""
    enter_folder(page, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    script = "\n".join(block.text for block in read_blocks(page) if block.language == "bash")
    is_skipped = False
    for words in expand_commands(script, tmp_path / "stubs"):
        reads_skipped_run = is_skipped and words[1:2] == ["report"] and not (tmp_path / words[2]).exists()
        if needs_other_machines(words) or reads_skipped_run:
            is_skipped = True
            continue
        program = [sys.executable, "-m", "tokenprune"] if words[0] == "tokenprune" else [sys.executable]
        command = [*program, *words[1:]]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-1000:]}{result.stderr[-2000:]}"


def test_the_strategy_of_the_tutorial_passes_the_check(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first code block of the tutorial is a file that the commands of the tutorial accept."""
    enter_folder("docs/tutorials/own-strategy.md", in_empty_folder)
    options = ["--reducer.early", "0.5", "--families", "llava_next", "qwen2_5_vl"]
    assert main(["check", "edges.py:Edges", *options]) == 0
    assert "Edges meets the contract" in capsys.readouterr().out


def test_the_guide_to_compositions_is_consistent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, its command lines and its YAML describe the same compositions."""
    page = "docs/how-to/compose.md"
    names = run_page(page, tmp_path, monkeypatch)
    assert (tmp_path / "stages.png").is_file()
    assert names["run"].account.cuts[1].kept == names["run"].account.kept // 2
    assert parse_reducer(["--reducer", "attended.py:Attended(layer=1, budget=0.5)"]).label == "Attended"
    expressions = re.findall(r"^tokenprune \w+ (?:--reducer )?'([^']*)'", (ROOT / page).read_text(), re.MULTILINE)
    assert expressions
    for expression in expressions:
        assert "+" in parse_reducer(["--reducer", expression]).label
    (document,) = [yaml.safe_load(block.text) for block in read_blocks(page) if block.language == "yaml"]
    assert parse_reducer(["--reducer", json.dumps(document["reducer"])]) == names["reducer"]


@pytest.mark.parametrize(
    ("page", "command", "list_rows"),
    [
        ("docs/reference/strategies.md", "tokenprune list strategies --markdown", strategy_rows),
        ("docs/reference/models.md", "tokenprune list models --markdown", model_rows),
    ],
)
def test_tables_are_current(page: str, command: str, list_rows: Any) -> None:
    """To update a table, paste the output of the command."""
    text = (ROOT / page).read_text()
    table = text.partition(f"<!-- {command} -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == as_markdown(list_rows())


def test_readme_is_short_and_links_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    links = re.findall(r"\]\(([^):\s]+)\)", text)
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]
    for command in ("pip install -e . && tokenprune run", 'pip install -e ".[test]" && pytest -n auto'):
        assert f"\n{command}\n" in text


@pytest.mark.slow
def test_the_image_of_the_readme_is_current() -> None:
    """Its text states that the answers are equal. To update it, run ``python docs/_site/draw_overlay.py``."""
    names = runpy.run_path(str(ROOT / "docs/_site/draw_overlay.py"))
    (header, *lines), overlay = names["answer_questions"]()
    assert header == ("", "all 500 tokens", "HiRED(0.2): 100 tokens")
    assert all(full == reduced for _, full, reduced in lines)
    with Image.open(ROOT / "docs/images/overlay.png") as stored:
        assert stored.size == names["draw_answers"]([header, *lines], overlay).size


@pytest.mark.slow
def test_the_figures_of_question_first_are_current() -> None:
    """Its text states which answers are right. To update them, run ``python docs/_site/draw_failures.py``."""
    names = runpy.run_path(str(ROOT / "docs/_site/draw_failures.py"))
    results, figure = names["draw_figure"](names["FAILURES"], names["STRATEGIES"][:1])
    assert results == [[False], [False], [False]]
    with Image.open(ROOT / "docs/images/question-first-failures.png") as stored:
        assert stored.size == figure.size
    results, figure = names["draw_figure"](names["COMPARED"], names["STRATEGIES"])
    assert results == [[False, False, True, True], [True, False, False, False], [True, True, False, False]]
    with Image.open(ROOT / "docs/images/question-first-side-by-side.png") as stored:
        assert stored.size == figure.size
