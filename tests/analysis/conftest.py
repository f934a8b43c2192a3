"""The report of an ablation with a known result."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.reports import write_run_directory
from tokenprune.experiments.analysis.report import write_report


@pytest.fixture(scope="module")
def report_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_run_directory(tmp_path_factory.mktemp("report") / "grid")
    paths = write_report(directory)
    names = ["report.md", "report.tex", "report.html", "settings.csv", "records.csv"]
    assert [path.name for path in paths] == [*names, "accuracy_vs_tokens.png", "accuracy_vs_time.png", "effects.png"]
    assert all(path.stat().st_size > 100 for path in paths)
    return directory
