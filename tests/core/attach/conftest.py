"""The models and inputs of the tests of attached strategies: LLaVA and LLaVA-NeXT."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.llava import ROWS, SQUARE
from tokenprune.testing.tiny_models import batch, tiny_model

FAMILIES = ["llava_next", "llava"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    model = tiny_model(family)
    model(**batch(family, [SQUARE]))  # transformers installs capturing hooks at the first call
    return model


@pytest.fixture
def inputs(family: str) -> Any:
    return batch(family, *ROWS)
