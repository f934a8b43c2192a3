"""The documentation site builds without a warning and documents all public names, strategies and commands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tokenprune
from tokenprune.catalog import components, strategies
from tokenprune.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site and return its folder."""
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip('needs the extra "docs"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert not [page for page in pages if f": {page}\n" not in text]
    assert yaml.safe_load(text)["docs_dir"] == "docs"


def test_site_documents_everything_public(site: Path) -> None:
    for name, module in tokenprune._MODULES.items():
        assert f'id="tokenprune.{module}.{name}"' in (site / f"reference/api/{module}.html").read_text(), name
    for page, classes in (("strategies", strategies()), ("components", components())):
        text = (site / f"reference/{page}.html").read_text()
        assert not [name for name, cls in classes.items() if f'id="{cls.__module__}.{name}"' not in text]
    commands = (site / "reference/cli.html").read_text()
    assert not [command for command in COMMANDS if f"usage: tokenprune {command} " not in commands]


def test_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert 'src="http' not in text, page
        assert 'rel="stylesheet" href="http' not in text, page
