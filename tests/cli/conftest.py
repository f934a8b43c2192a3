"""A file with a strategy, and an empty working directory for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli import STRATEGY_SOURCE


@pytest.fixture
def strategy_file(tmp_path: Path) -> Path:
    (tmp_path / "loud.py").write_text(STRATEGY_SOURCE)
    return tmp_path / "loud.py"


@pytest.fixture(autouse=True)
def _in_empty_folder(in_empty_folder: Path) -> None:
    """Run each test in an empty folder."""
