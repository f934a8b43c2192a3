"""Test layer choices and the accessors of signals by layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import resolve_layers
from tokenprune.testing.encoded_images import random_encoded_image


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("first", (0,)),
        ("feature", (22,)),
        (0, (0,)),
        (23, (23,)),
        (-1, (23,)),
        (-24, (0,)),
        (0.0, (0,)),
        (1.0, (23,)),
        (0.5, (12,)),  # round(11.5), half to even
        ([0, "feature", -1, 0.0], (0, 22, 23, 0)),
        ((1, 2), (1, 2)),
        ([[0, 1], "first"], (0, 1, 0)),
    ],
)
def test_layer_choices_resolve_to_indices(choice: object, expected: tuple[int, ...]) -> None:
    assert resolve_layers(choice, 24, 22) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "choice", ["last", "", 24, -25, 1.5, -0.1, float("nan"), True, False, None, ["first", 24], {"a": 1}]
)
def test_invalid_layer_choices_raise(choice: object) -> None:
    with pytest.raises(ValueError, match="is no layer of a vision tower with 24 layers"):
        resolve_layers(choice, 24, 22)  # type: ignore[arg-type]


def test_an_empty_list_of_layers_raises() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        resolve_layers([], 24, 22)


@settings(deadline=None)
@given(layers=st.integers(1, 40), depth=st.floats(0, 1))
def test_a_relative_depth_is_always_a_layer(layers: int, depth: float) -> None:
    (index,) = resolve_layers(depth, layers, 0)
    assert 0 <= index < layers
    assert abs(index - depth * (layers - 1)) <= 0.5


def test_reading_averages_over_layers_in_float32() -> None:
    image = random_encoded_image(TileGeometry.single((2, 3)))
    half_signals = {key: value.half() for key, value in image.signals.items()}
    image = EncodedImage(image.geometry, image.features, half_signals, layers=4, feature_layer=2)
    average = image.cls_attention(["first", "feature"])
    assert average.dtype == torch.float32
    expected = (half_signals["cls_attention", 0].float() + half_signals["cls_attention", 2].float()) / 2
    torch.testing.assert_close(average, expected, rtol=0, atol=1e-7)
    assert torch.equal(image.cls_attention("feature"), half_signals["cls_attention", 2].float())


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("cls_attention", "cls_attention"),
        ("received_attention", "received_attention"),
        ("keys", "keys"),
        ("vision_features", "vision_features"),
    ],
)
def test_each_accessor_reads_the_signal_of_its_name(method: str, kind: str) -> None:
    value = torch.rand(1, 2, 6)
    image = EncodedImage(TileGeometry.single((2, 3)), torch.zeros(1, 6, 2), {(kind, 3): value}, layers=4)
    assert torch.equal(getattr(image, method)(-1), value)


def test_reading_an_undeclared_signal_raises() -> None:
    geometry = TileGeometry.single((2, 2))
    image = EncodedImage(geometry, torch.zeros(1, 4, 2), {("keys", 1): torch.zeros(1, 1, 4, 2)}, layers=4)
    with pytest.raises(LookupError, match=r"cls_attention of layer 0 was not captured \(captured: keys of layer 1\)"):
        image.cls_attention("first")
    with pytest.raises(LookupError, match=r"declare Signal\('cls_attention', 'first'\)"):
        image.read(Signal("cls_attention", "first"))
    with pytest.raises(LookupError, match="captured: none"):
        EncodedImage(geometry, torch.zeros(1, 4, 2)).keys("first")
