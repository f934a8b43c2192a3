"""The model and the batch of the tests of `generate`."""

from __future__ import annotations

from typing import Any

import pytest

from tokenprune.testing.tiny_models import batch, tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model("llava_next")
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def inputs() -> Any:
    return batch("llava_next", [(112, 112)], [(60, 160)])
