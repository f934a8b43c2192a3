"""Strategies that shrink the image: the layout at lower resolution, and what the model is given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tokenprune.adapter import find_adapter
from tokenprune.budget import Budget
from tokenprune.image import NEWLINE, TileGeometry
from tokenprune.pipeline import Pipeline
from tokenprune.strategies import HiRED, ImageDownsample
from tokenprune.testing.tiny_models import batch, tiny_model

LAYOUTS = st.builds(
    lambda size, grid: TileGeometry.anyres(size, grid, (6, 6), 84) if all(grid) else TileGeometry.single((6, 6)),
    st.tuples(st.integers(10, 400), st.integers(10, 400)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)


@given(LAYOUTS, st.integers(1, 6), st.integers(1, 6))
def test_a_lower_resolution_stands_at_tokens_of_the_higher_in_the_same_order(layout, height, width) -> None:
    assume((height, width) != layout.token_grid)  # the layout itself, see the next test
    assume(layout.sub_images == 0 or bool(layout.valid[1:].any()))  # a strip so thin that only its newlines are left
    small, standing = layout.resized((height, width))
    assert int(standing.sum()) == int((small.packed != NEWLINE).sum())
    assert not bool((standing & ~layout.valid).any())
    own = layout.packed[layout.packed != NEWLINE]
    full = own[standing.flatten()[own]]
    tiny = small.packed[small.packed != NEWLINE]
    assert torch.equal(full // layout.tokens, tiny // small.tokens)  # the same tiles in the same order
    rows = layout.newline_of[layout.packed != NEWLINE][standing.flatten()[own]]
    assert small.newlines == len(set(rows[rows >= 0].tolist()))


@given(LAYOUTS)
def test_the_full_resolution_is_the_layout_itself(layout) -> None:
    small, standing = layout.resized(layout.token_grid)
    assert torch.equal(small.packed, layout.packed)
    assert torch.equal(standing, layout.valid)


@given(LAYOUTS, st.integers(0, 200), st.sampled_from(["free", "counted"]))
@example(TileGeometry.anyres((400, 10), (1, 1), (6, 6), 84), 36, "counted")  # a strip: newlines without a token
def test_the_largest_grid_that_fits_is_chosen(layout, amount, newlines) -> None:
    reducer = ImageDownsample(Budget(amount, newlines=newlines))
    grid = reducer.token_grid(layout)

    def cost(grid: tuple[int, int]) -> int:
        packed = layout.resized(grid)[0].packed
        return len(packed) - (int((packed == NEWLINE).sum()) if newlines == "free" else 0)

    near = [(h, w) for h in range(1, 7) for w in range(1, 7) if abs(h - w) <= 0]
    fitting = [h * w for h, w in near if cost((h, w)) <= amount]
    assert (grid is None) == (not fitting)
    if grid is not None:
        assert cost(grid) <= amount
        assert grid[0] * grid[1] == max(fitting)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_at_full_resolution_the_adapter_gives_the_models_own_features(family: str) -> None:
    adapter = find_adapter(tiny_model(family))
    inputs = dict(batch(family, [(112, 112)], [(60, 160)]))
    with torch.no_grad():
        expected = adapter.encode(inputs, ())
        grids = [image.geometry.token_grid for image in expected.images]
        found = adapter.encode_resized(inputs, grids)
    for one, other in zip(expected.packed, found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("newlines", ["keep_rows", "drop"])
def test_the_model_is_given_the_smaller_image(family: str, newlines) -> None:
    model = tiny_model(family)
    inputs = batch(family, [(112, 112)], [(60, 160), (150, 50)])
    reducer = ImageDownsample(0.3, newlines=newlines)
    runs = []
    hook = model.base_model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append((args or (kwargs["pixel_values"],))[0].shape[-2:]), with_kwargs=True
    )
    with torch.no_grad(), reducer(model) as run:
        logits = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=2)
    hook.remove()
    assert logits.isfinite().all()
    assert all(shape[0] < 56 for shape in runs)  # the tower never saw the full image
    for selection in run.selections:
        assert 0 < selection.kept_tokens <= selection.asked
        assert (selection.kept_newlines == 0) == (newlines == "drop" or not selection.geometry.newlines)
    assert len(run.selections) == 6


def test_a_flat_image_of_another_resolution_gives_the_same_image() -> None:
    """Shrinking really reads the pixels: the same image, shrunk, differs from another one, shrunk."""
    adapter = find_adapter(tiny_model("llava"))
    one, other = (dict(batch("llava", [(112, 112)], seed=seed)) for seed in (0, 5))
    with torch.no_grad():
        same = [adapter.encode_resized(one, [(2, 2)])[0] for _ in range(2)]
        different = adapter.encode_resized(other, [(2, 2)])[0]
    assert torch.equal(*same)
    assert not torch.allclose(same[0], different, atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_all_tokens_are_the_models_own_and_none_are_none(family: str) -> None:
    model = tiny_model(family)
    inputs = batch(family, [(112, 112)], [(60, 160)])
    with torch.no_grad():
        before = model(**inputs).logits
        with ImageDownsample(1.0)(model):
            assert torch.equal(model(**inputs).logits, before)
        with ImageDownsample(0)(model) as run:
            empty = model(**inputs).logits
        with HiRED(0)(model):
            assert torch.equal(model(**inputs).logits, empty)
    assert [selection.kept_tokens for selection in run.selections] == [0, 0]


def test_a_shared_encoding_is_encoded_anew_once() -> None:
    model = tiny_model("llava_next")
    adapter, inputs = find_adapter(model), dict(batch("llava_next", [(112, 112)]))
    calls = []
    hook = model.base_model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        encoding = adapter.encode(inputs, ()).repeat(3)
        text = {name: inputs[name].repeat(3, 1) for name in ("input_ids", "attention_mask")}
        out = Pipeline(ImageDownsample(0.2), adapter).prepare(text, generating=True, encoding=encoding).inputs
    hook.remove()
    assert len(calls) == 2
    first, *rest = out["mm_encoder_outputs"]["image"].pooler_output
    assert len(rest) == 2
    assert all(torch.equal(first, one) for one in rest)
