"""Settings for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.helpers.families import FAMILIES, REPRESENTATIVES
from tokenprune.testing.families.base import Family

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do the processes that tests start
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The examples are the same in every run, so that a failure is due to the latest change. To test new examples:
# pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


PRODUCTS = (
    "test_families",
    "test_whole_output",
    "test_truncated_tower",
    "test_truncated_families",
    "test_inputs",
    "test_text_separators",
    "test_decoder_traces",
)
"""Modules that run all checks on all families."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the families that are not in `REPRESENTATIVES` as slow, in the modules of `PRODUCTS`."""
    for item in items:
        if isinstance(item, pytest.Function) and item.module.__name__.rpartition(".")[2] in PRODUCTS:
            callspec = getattr(item, "callspec", None)
            names = {value for value in callspec.params.values() if isinstance(value, str)} if callspec else set()
            if names & FAMILIES.keys() and not names & REPRESENTATIVES:
                item.add_marker("slow")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Return each family of the test matrix."""
    family = FAMILIES[request.param]
    if not family.adapter.supports_transformers():
        pytest.skip("the unmodified model raises in the installed transformers")
    return family


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter an empty folder and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
