"""The package: the content of a wheel, the cost of an import, and imports between folders."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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
    assert "tokenprune/cli/help/run.txt" in wheel
    assert not [name for name in wheel if "research" in name or "test_" in name]
    assert "tokenprune/experiments/configs/models/llava-v1.6-vicuna-7b.json" in wheel
    files = {
        str(Path("tokenprune", path.relative_to(ROOT / folder if folder == "tokenprune" else ROOT)))
        for folder in ("tokenprune", *FOLDERS)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {Path(name).name for name in files - set(wheel)} <= {"README.md"}


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


def test_the_package_and_the_help_of_all_commands_load_no_heavy_dependency() -> None:
    heavy = "torch", "transformers", "timm", "wandb", "matplotlib", "numpy"
    code = f"""
import sys
import tokenprune
from tokenprune.cli.main import COMMANDS, main
codes = [main([*command.split(), "--help"]) for command in ("", *COMMANDS, "bench run", "bench strategies")]
print(codes == [0] * len(codes), [name for name in {heavy!r} if name in sys.modules])
"""
    assert run_python(code).stdout.splitlines()[-1] == "True []"


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


@pytest.mark.parametrize(
    ("name", "package"),
    [("HiRED", "strategies"), ("FastV", "strategies"), ("GuidedAllocation", "strategies.components")],
)
def test_a_strategy_in_the_wrong_package_is_located(name: str, package: str) -> None:
    hint = f"module 'tokenprune' has no attribute '{name}'; write `from tokenprune.{package} import {name}`"
    with pytest.raises(ImportError, match=hint):
        exec(f"from tokenprune import {name}")
    with pytest.raises(AttributeError, match=hint):
        getattr(tokenprune, name)
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from tokenprune import Nothing")
    exec(f"from tokenprune.{package} import {name}")


def test_all_components_are_exported() -> None:
    from tokenprune.catalog import components
    from tokenprune.strategies import components as package

    shipped = {name: cls for name, cls in components().items() if cls.__module__.startswith("tokenprune.strategies.")}
    assert set(package.__all__) == set(shipped)
    assert all(getattr(package, name) is cls for name, cls in shipped.items())


def test_help_of_strategies_and_components_describes_all_parameters() -> None:
    from tokenprune.catalog import components, strategies

    for cls in {**strategies(), **components()}.values():
        names = [field.name for field in dataclasses.fields(cls) if field.init]
        text = inspect.getdoc(cls)
        assert [name for name in names if text.count(f"\n    {name}: ") != 1] == [], cls


def test_version_is_the_same_everywhere() -> None:
    version = tokenprune.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_verified_json_matches_the_tests() -> None:
    """To update the file, run ``python -m tests.helpers.verified > models/verified.json``."""
    from tests.helpers.verified import text

    assert (ROOT / "models/verified.json").read_text() == text() + "\n"
