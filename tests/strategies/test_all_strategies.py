"""Every strategy before the LLM spends its budget exactly and gives deterministic masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.catalog import strategies
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.testing.encoded_images import random_encoded_image

STRATEGIES = sorted(name for name, kind in strategies().items() if kind.stage.name in ("image", "projector"))


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(10, 300), st.integers(10, 300)),
    grid=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    budget=st.one_of(st.integers(0, 200), st.floats(0, 1)),
    newlines=st.sampled_from(["keep_rows", "drop", "keep"]),
    seed=st.integers(0, 50),
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_budget_is_spent_exactly(name, size, grid, budget, newlines, seed) -> None:
    layout = TileGeometry.single((4, 4)) if not all(grid) else TileGeometry.anyres(size, grid, (4, 4), 56)
    reducer: Any = strategies()[name]
    selection = reducer(budget, newlines=newlines).reduce(random_encoded_image(layout, seed))
    expected = min(selection.asked, int(layout.valid.sum()))
    assert selection.kept_tokens == expected if reducer.exact else selection.kept_tokens <= expected
    assert selection.granted_per_tile == selection.kept_per_tile
    if selection.mixing is not None:
        weights = selection.mixing.to_dense()
        assert torch.allclose(
            weights.sum(dim=1), torch.ones(len(weights)), atol=1e-5
        )  # the repaired methods merge by means
        assert bool((weights >= 0).all())


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", STRATEGIES)
def test_constant_images_have_exact_and_deterministic_masks(name: str, value: float) -> None:
    """Masks are exact and deterministic if all attention and features are equal, or are zero vectors."""
    layout = TileGeometry.anyres((60, 160), (1, 3), (4, 4), 56)
    image = random_encoded_image(layout)
    constant_signals = {key: torch.full_like(signal, value) for key, signal in image.signals.items()}
    constant_image = EncodedImage(
        layout, torch.full_like(image.features, value), constant_signals, image.layers, image.feature_layer
    )
    reducer: Any = strategies()[name]
    selection = reducer(17).reduce(constant_image)
    assert selection.kept_tokens == 17 if reducer.exact else selection.kept_tokens <= 17
    assert torch.equal(selection.kept, reducer(17).reduce(constant_image).kept)
