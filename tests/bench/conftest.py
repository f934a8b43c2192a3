"""The tiny model of the tests of the benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.bench import SIZES
from tokenprune.adapter import find_adapter
from tokenprune.experiments.bench.bench_model import BenchModel
from tokenprune.testing.tiny_models import batch, tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llava_next")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return dict(batch("llava_next", *SIZES))


@pytest.fixture
def tiny(model: Any, inputs: dict[str, Any]) -> BenchModel:
    adapter = find_adapter(model)
    return BenchModel("tiny", model, adapter, "random", 2, 2, lambda images: inputs)
