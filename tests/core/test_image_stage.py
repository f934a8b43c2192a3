"""Strategies that shrink the image: the layout at lower resolution, and the pixels that the model receives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tokenprune.adapter import find_adapter
from tokenprune.budget import Budget
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.pipeline import Pipeline
from tokenprune.strategies import HiRED, ImageDownsample
from tokenprune.testing.tiny_models import batch, tiny_model

LAYOUTS = st.builds(
    lambda size, grid: TileGeometry.anyres(size, grid, (6, 6), 84) if all(grid) else TileGeometry.single((6, 6)),
    st.tuples(st.integers(10, 400), st.integers(10, 400)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)


@given(LAYOUTS, st.integers(1, 6), st.integers(1, 6))
def test_centers_of_a_lower_resolution_are_valid_tokens_in_the_same_order(layout, height, width) -> None:
    assume((height, width) != layout.token_grid)  # the unchanged layout, see the next test
    assume(layout.sub_images == 0 or bool(layout.valid[1:].any()))  # thin strips keep only newline tokens
    small, centers = layout.resized((height, width))
    assert int(centers.sum()) == int((small.packed != NEWLINE).sum())
    assert not bool((centers & ~layout.valid).any())
    order = layout.packed[layout.packed != NEWLINE]
    full = order[centers.flatten()[order]]
    reduced = small.packed[small.packed != NEWLINE]
    assert torch.equal(full // layout.tokens, reduced // small.tokens)  # the same tiles in the same order
    rows = layout.newline_index[layout.packed != NEWLINE][centers.flatten()[order]]
    assert small.newlines == len(set(rows[rows >= 0].tolist()))


@given(LAYOUTS)
def test_the_full_resolution_does_not_change_the_layout(layout) -> None:
    small, centers = layout.resized(layout.token_grid)
    assert torch.equal(small.packed, layout.packed)
    assert torch.equal(centers, layout.valid)


@given(LAYOUTS, st.integers(0, 200), st.sampled_from(["free", "counted"]))
@example(
    TileGeometry.anyres((400, 10), (1, 1), (6, 6), 84), 36, "counted"
)  # a strip: newline tokens without visual tokens
def test_the_largest_grid_that_fits_is_chosen(layout, amount, newlines) -> None:
    reducer = ImageDownsample(Budget(amount, newlines=newlines))
    grid = reducer.token_grid(layout)

    def cost(grid: tuple[int, int]) -> int:
        packed = layout.resized(grid)[0].packed
        return len(packed) - (int((packed == NEWLINE).sum()) if newlines == "free" else 0)

    candidates = [(h, w) for h in range(1, 7) for w in range(1, 7) if abs(h - w) <= 0]
    fitting = [h * w for h, w in candidates if cost((h, w)) <= amount]
    assert (grid is None) == (not fitting)
    if grid is not None:
        assert cost(grid) <= amount
        assert grid[0] * grid[1] == max(fitting)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_at_full_resolution_the_adapter_returns_the_features_of_the_model(family: str) -> None:
    adapter = find_adapter(tiny_model(family))
    inputs = dict(batch(family, [(112, 112)], [(60, 160)]))
    with torch.no_grad():
        expected = adapter.encode(inputs, ())
        grids = [image.geometry.token_grid for image in expected.images]
        resized = adapter.encode_resized(inputs, grids)
    for expected_features, features in zip(expected.packed, resized, strict=True):
        assert torch.allclose(expected_features, features, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("newlines", ["keep_rows", "drop"])
def test_the_model_receives_the_smaller_image(family: str, newlines) -> None:
    model = tiny_model(family)
    inputs = batch(family, [(112, 112)], [(60, 160), (150, 50)])
    reducer = ImageDownsample(0.3, newlines=newlines)
    shapes = []
    hook = model.base_model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((args or (kwargs["pixel_values"],))[0].shape[-2:]), with_kwargs=True
    )
    with torch.no_grad(), reducer(model) as run:
        logits = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=2)
    hook.remove()
    assert logits.isfinite().all()
    assert all(shape[0] < 56 for shape in shapes)  # the tower never encodes the full image
    for selection in run.selections:
        assert 0 < selection.kept_tokens <= selection.asked
        assert (selection.kept_newlines == 0) == (newlines == "drop" or not selection.geometry.newlines)
    assert len(run.selections) == 6


def test_resized_features_depend_on_the_pixels() -> None:
    """Resized features are equal for the same image, and differ for two images."""
    adapter = find_adapter(tiny_model("llava"))
    first, second = (dict(batch("llava", [(112, 112)], seed=seed)) for seed in (0, 5))
    with torch.no_grad():
        same = [adapter.encode_resized(first, [(2, 2)])[0] for _ in range(2)]
        different = adapter.encode_resized(second, [(2, 2)])[0]
    assert torch.equal(*same)
    assert not torch.allclose(same[0], different, atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_full_and_zero_budgets(family: str) -> None:
    model = tiny_model(family)
    inputs = batch(family, [(112, 112)], [(60, 160)])
    with torch.no_grad():
        before = model(**inputs).logits
        with ImageDownsample(1.0)(model):
            assert torch.equal(model(**inputs).logits, before)
        with ImageDownsample(0)(model) as run:
            text_logits = model(**inputs).logits
        with HiRED(0)(model):
            assert torch.equal(model(**inputs).logits, text_logits)
    assert [selection.kept_tokens for selection in run.selections] == [0, 0]


def test_a_shared_encoding_is_resized_once() -> None:
    model = tiny_model("llava_next")
    adapter, inputs = find_adapter(model), dict(batch("llava_next", [(112, 112)]))
    calls = []
    hook = model.base_model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        encoding = adapter.encode(inputs, ()).repeat(3)
        text = {name: inputs[name].repeat(3, 1) for name in ("input_ids", "attention_mask")}
        out = Pipeline(ImageDownsample(0.2), adapter).prepare(text, for_generate=True, encoding=encoding).inputs
    hook.remove()
    assert len(calls) == 2
    first, *remaining = out["mm_encoder_outputs"]["image"].pooler_output
    assert len(remaining) == 2
    assert all(torch.equal(first, features) for features in remaining)
