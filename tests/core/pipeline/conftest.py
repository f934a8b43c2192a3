"""The model and the batch of the tests of the pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.llava import TWO_ROWS
from tokenprune.testing.tiny_models import batch, tiny_model


@pytest.fixture
def model() -> Any:
    return tiny_model("llava_next")


@pytest.fixture
def inputs() -> Any:
    return batch("llava_next", *TWO_ROWS)
