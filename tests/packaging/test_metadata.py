"""Metadata of the project: bounds of dependencies, Python versions, citation, and workflows."""

from __future__ import annotations

import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import tokenprune
from tokenprune import dependencies
from tokenprune.cli.main import main
from tokenprune.dependencies import check_dependencies, find_broken_bounds, format_broken_bounds
from tokenprune.strategies import HiRED

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))


def test_installed_versions_are_in_the_bounds() -> None:
    assert find_broken_bounds(PROJECT["dependencies"]) == {}


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_every_dependency_has_a_floor_that_errors_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requirement = Requirement(text)
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    monkeypatch.setattr(dependencies, "read_version", {requirement.name: "0.0.1"}.get)
    bounds = find_broken_bounds(PROJECT["dependencies"])
    assert bounds == {f"{requirement.name}{requirement.specifier}": "0.0.1"}
    message = f"needs {requirement.name}{requirement.specifier}, but 0.0.1 is installed; run: pip install -U '"
    assert message in format_broken_bounds(bounds)


@pytest.mark.parametrize(("installed", "is_broken"), [("5.17.0", True), ("5.23.0", False), ("6.0.0.dev0", False)])
def test_bounds_admit_newer_versions(installed: str, is_broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "read_version", {"transformers": installed}.get)
    assert bool(find_broken_bounds(PROJECT["dependencies"])) == is_broken


def test_bounds_of_extras_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "read_version", {"filelock": "4.0"}.get)
    assert find_broken_bounds(["filelock>=3.12", 'filelock<4; extra == "lmms"']) == {}


@pytest.fixture
def _old_transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(dependencies, "requires", lambda name: PROJECT["dependencies"])
    monkeypatch.setattr(dependencies, "read_version", {"transformers": "5.17.0"}.get)
    check_dependencies.cache_clear()
    yield
    check_dependencies.cache_clear()


@pytest.mark.usefixtures("_old_transformers")
def test_old_transformers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"needs transformers>=5.23, but 5.17.0 is installed"):
        HiRED(0.2).attach(None)
    assert main(["list", "models"]) == 2
    assert "needs transformers>=5.23, but 5.17.0 is installed" in capsys.readouterr().err
    assert main(["list", "--help"]) == 0


def test_python_versions_agree() -> None:
    prefix = "Programming Language :: Python :: 3."
    minors = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert minors == ["11", "12", "13"]
    assert not [minor for minor in minors if f"3.{minor}.0" not in SpecifierSet(PROJECT["requires-python"])]
    assert "3.10.0" not in SpecifierSet(PROJECT["requires-python"])
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{minors[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == f"3.{minors[0]}"
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["checks"]["strategy"]["matrix"]
    assert matrix["python"] == [f"3.{minor}" for minor in minors]


def test_license_is_named_everywhere() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / PROJECT["license-files"][0]).read_text()


def test_citation_names_the_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (tokenprune.__version__, PROJECT["license"])
    assert isinstance(citation["date-released"], date)
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Arif",
        "Yoon",
        "Nikolopoulos",
        "Vandierendonck",
        "John",
        "Ji",
    ]
    assert paper["url"] == PROJECT["urls"]["Paper"] == "https://arxiv.org/abs/2408.10945"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_existing_scripts_and_extras(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        for script in re.findall(r"\.ci/\w+", command):
            assert (ROOT / script).stat().st_mode & 0o111, script
        for extra in re.findall(r"\.\[([\w,]+)\]", command):
            assert set(extra.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_workflows_cover_checks_documentation_and_package() -> None:
    text = "".join(path.read_text() for path in WORKFLOWS)
    for command in (".ci/run", ".ci/package", "mkdocs build --strict"):
        assert f"run: {command}\n" in text


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_are_valid(path: Path) -> None:
    """The keys are those of GitHub's issue forms, and ids are unique."""
    form = yaml.safe_load(path.read_text())
    assert form.keys() == {"name", "description", "labels", "body"}
    names = [item["id"] for item in form["body"]]
    assert len(names) == len(set(names))
    for item in form["body"]:
        assert item.keys() <= {"type", "id", "attributes", "validations"}
        assert item["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert item["attributes"]["label"]
        for page in re.findall(r"docs/[\w/-]+\.md|[A-Z]+\.md", str(item)):
            assert (ROOT / page).is_file(), page
