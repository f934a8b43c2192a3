"""The package: the content of a wheel, the cost of an import, imports between folders, and the documentation."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokenprune

ROOT = Path(__file__).parents[2]
FOLDERS = ("strategies", "models", "experiments")


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build a wheel from a clean copy of the sources, and return its file names."""
    out = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out / "dist"),
        str(out / "src"),
    ]
    for folder in ("tokenprune", *FOLDERS):
        shutil.copytree(
            ROOT / folder, out / "src" / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, out / "src" / file)
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (path,) = (out / "dist").glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_wheel_holds_one_package(wheel: list[str]) -> None:
    folders = {name.split("/")[0] for name in wheel}
    assert folders == {"tokenprune", f"tokenprune-{tokenprune.__version__}.dist-info"}
    for path in ("strategies/hired.py", "strategies/components/selection.py", "models/llava_next.py", "py.typed"):
        assert f"tokenprune/{path}" in wheel
    for path in ("model.safetensors", "tokenizer.json", "processor_config.json", "config.json"):
        assert f"tokenprune/models/mini/checkpoint/{path}" in wheel
    assert "tokenprune/models/mini/images/board.png" in wheel
    assert "tokenprune/models/verified.json" in wheel
    assert not [name for name in wheel if "research" in name or "test_" in name]
    assert "tokenprune/experiments/configs/models/llava-v1.6-vicuna-7b.json" in wheel


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_cannot_be_imported_under_their_bare_names(folder: str) -> None:
    """Without this error, `import strategies` from the repository root would load every module a second time."""
    result = run_python(f"import {folder}")
    assert result.returncode == 1
    assert f"import tokenprune.{folder}, not {folder}" in result.stderr
    assert run_python(f"import tokenprune.{folder}").returncode == 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative(folder: str) -> None:
    link = ROOT / "tokenprune" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder


def test_importing_the_package_loads_no_heavy_dependency() -> None:
    heavy = "torch", "transformers", "timm", "wandb", "matplotlib", "numpy"
    code = f"import sys, tokenprune, tokenprune.cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


def test_strategies_never_load_transformers() -> None:
    code = "import sys; from tokenprune.catalog import components, strategies; strategies(), components()"
    loaded = run_python(f"{code}; print(sys.modules.keys())").stdout
    assert "tokenprune.strategies.hired" in loaded
    assert "'transformers'" not in loaded


def list_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_folders_import_only_allowed_packages() -> None:
    """experiments -> strategies, models -> core; strategies and models never import each other."""
    forbidden = {
        "strategies": ("tokenprune.models", "tokenprune.experiments", "tokenprune.cli", "transformers"),
        "models": ("tokenprune.strategies", "tokenprune.experiments", "tokenprune.cli"),
        "tokenprune": ("tokenprune.strategies", "tokenprune.models.", "tokenprune.experiments", "tokenprune.cli"),
        "tokenprune/testing": ("tokenprune.strategies", "tokenprune.experiments"),
    }
    for folder, prefixes in forbidden.items():
        files = (ROOT / folder).glob("*.py") if folder == "tokenprune" else (ROOT / folder).rglob("*.py")
        for path in files:
            if path == ROOT / "tokenprune" / "__main__.py":  # the command line
                continue
            wrong = [name for name in list_imports(path) for prefix in prefixes if f"{name}.".startswith(prefix)]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_no_module_imports_research_or_tests() -> None:
    for folder in ("tokenprune", *FOLDERS):
        for path in (ROOT / folder).rglob("*.py"):
            assert not [name for name in list_imports(path) if name.split(".")[0] in ("research", "tests")], path
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in list_imports(path) if ".test_" in name], path


def list_module_files() -> dict[str, Path]:
    """Return the file of each module of the package and of `research`."""
    files = {}
    for folder in ("tokenprune", *FOLDERS, "research"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:1] != ("tokenprune",) or parts[1] not in FOLDERS:
                prefix = ("tokenprune",) if folder in FOLDERS else ()
                files[".".join([*prefix, *parts]).removesuffix(".__init__")] = path
    return files


def find_dependencies(node: ast.AST, files: dict[str, Path]) -> set[str]:
    """Return the modules that code imports, also inside functions, without imports for type checkers."""
    modules: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            modules |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.module:
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            modules |= {name if name in files else child.module for name in names}
        modules |= find_dependencies(child, files)
    return modules & files.keys()


def test_imports_have_no_cycle() -> None:
    files = list_module_files()
    graph = {name: find_dependencies(ast.parse(path.read_text()), files) - {name} for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError
    assert len(graph) > 150


def test_public_names_exist() -> None:
    for name in tokenprune.__all__:
        assert getattr(tokenprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tokenprune.nothing  # noqa: B018


def test_version_is_the_same_everywhere() -> None:
    version = tokenprune.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "blocks"),
    [
        ("README.md", 3),
        ("docs/index.md", 2),
        ("docs/how-to/write-a-strategy.md", 7),
        ("docs/how-to/run-experiments.md", 1),
        ("docs/how-to/write-an-adapter.md", 3),
        ("docs/how-to/wandb.md", 1),
    ],
)
def test_code_of_pages_runs(page: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code blocks of a page run in order in an empty folder."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    code = read_blocks(page)
    assert len(code) == blocks
    result = run_python("\n".join(code), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


def read_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_code_of_the_guide_to_compiled_graphs_runs(tmp_path: Path) -> None:
    """The block continues the first block of the home page. It is slow because it compiles graphs."""
    code = [read_blocks("docs/index.md")[0], *read_blocks("docs/how-to/compile.md")]
    result = run_python("\n".join(code), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


def test_every_page_with_code_is_tested() -> None:
    """A page of the tutorial or a how-to with Python blocks is run by a test of this module."""
    pages = [
        path.relative_to(ROOT) for path in (ROOT / "docs/how-to").glob("*.md") if "```python\n" in path.read_text()
    ]
    tests = Path(__file__).read_text()
    assert pages
    assert not [page for page in pages if f'"{page}"' not in tests]


def test_the_strategy_of_the_guide_passes_the_check(tmp_path: Path) -> None:
    """The first code block of the guide is a file that the commands of the guide accept."""
    (first, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/write-a-strategy.md").read_text(), re.DOTALL)
    (tmp_path / "edges.py").write_text(first)
    command = [sys.executable, "-m", "tokenprune", "check", "edges.py:Edges", "--reducer.early", "0.5"]
    command += ["--families", "llava_next", "qwen2_5_vl"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Edges meets the contract" in result.stdout


def test_readme_has_the_current_catalog() -> None:
    """To update the table, paste the output of ``tokenprune list strategies --markdown``."""
    from tokenprune.cli.listing import as_markdown, strategy_rows

    text = (ROOT / "README.md").read_text()
    table = text.partition("<!-- tokenprune list strategies --markdown -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == as_markdown(strategy_rows())


def test_docs_have_the_current_families() -> None:
    """To update the table, paste the output of ``tokenprune list models --markdown``."""
    from tokenprune.cli.listing import as_markdown, model_rows

    text = (ROOT / "docs/reference/models.md").read_text()
    table = text.partition("<!-- tokenprune list models --markdown -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == as_markdown(model_rows())


def test_verified_json_matches_the_tests() -> None:
    """To update the file, run ``python -m tests.helpers.verified > models/verified.json``."""
    from tests.helpers.verified import text

    assert (ROOT / "models/verified.json").read_text() == text() + "\n"


def test_the_guide_to_compositions_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two code blocks run in turn, and the command line accepts the strategy of the last block."""
    from tokenprune.cli.options import parse_reducer

    text = (ROOT / "docs/how-to/compose.md").read_text()
    *blocks, strategy = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    assert (tmp_path / "stages.png").is_file()
    assert namespace["run"].account.cuts[1].kept == namespace["run"].account.kept // 2
    (tmp_path / "attended.py").write_text(strategy)
    assert parse_reducer(["--reducer", "attended.py:Attended(layer=1, budget=0.5)"]).label == "Attended"
    for expression in re.findall(r"^tokenprune \w+ (?:--reducer )?'([^']*)'", text, re.MULTILINE):
        assert "+" in parse_reducer(["--reducer", expression]).label
    document = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert document
    config = yaml.safe_load(document[1])["reducer"]
    assert parse_reducer(["--reducer", json.dumps(config)]) == namespace["reducer"]
