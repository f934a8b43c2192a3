"""Errors about methods of a user's strategy name the method, its file and line, the returned and the expected value."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tokenprune import (
    AllocationPolicy,
    ComponentReducer,
    DecoderReducer,
    ImageReducer,
    Merged,
    MergingPolicy,
    OrderPolicy,
    RelevancePolicy,
    ScoreReducer,
    Selection,
    SelectionPolicy,
    Signal,
    TileGeometry,
    TokenReducer,
)
from tokenprune.policies import Component
from tokenprune.saliency import SaliencyModel, with_saliency
from tokenprune.strategies import HiRED
from tokenprune.strategies.components import TopNormSelection, TopRelevanceSelection, UniformAllocation
from tokenprune.testing.encoded_images import random_encoded_image

LAYOUT = TileGeometry.anyres((100, 100), (2, 2), (4, 4), 56)
MASK = "[tiles, tokens] = [5, 16]"


def define(base: type, method: str, result: Any) -> Any:
    """Return an instance of a user's class whose method returns a result, or the value of a function of its inputs."""

    def user_method(self: Any, *args: Any) -> Any:
        return result(*args) if callable(result) else result

    return dataclass(type("Mine", (base,), {"__module__": __name__, method: user_method}))()


def compose(base: type, method: str, result: Any) -> ComponentReducer:
    """Return a strategy with a user's component of a kind."""
    component = define(base, method, result)
    names = {AllocationPolicy: "allocation", MergingPolicy: "merging", OrderPolicy: "order", Component: "selection"}
    name = next(name for kind, name in names.items() if issubclass(base, kind))
    component = TopRelevanceSelection(component) if base is RelevancePolicy else component
    parts = {"allocation": UniformAllocation(), "selection": TopNormSelection(), name: component}
    return ComponentReducer(0.2, **parts)


def build_user_selection(**fields: Any) -> Callable[[Any], Selection]:
    """Return a function that selects one token, with some fields replaced."""
    kept = torch.zeros(5, 16, dtype=torch.bool)
    kept[0, 0] = True
    return lambda image: Selection(**{"geometry": image.geometry, "kept": kept, "asked": 1, **fields})


class DecoderScore(DecoderReducer, ScoreReducer):
    """The base of strategies inside the LLM with a score."""


@dataclass
class PickingSelection(SelectionPolicy):
    """Scores tokens by their norm; subclasses replace `pick`."""

    def score(self, image: Any) -> Any:
        return image.features.norm(dim=-1)


@dataclass
class ReservingMerging(MergingPolicy):
    """Merges nothing; subclasses replace `reserve`."""

    def merge(self, *args: Any) -> Any:
        raise AssertionError


NUMBERS = "Mine.allocate must return 5 numbers of tokens [tiles], not"


@pytest.mark.parametrize(
    ("build", "base", "method", "result", "message"),
    [
        (define, ScoreReducer, "score", [1.0], f"a tensor {MASK}, not list"),
        (define, ScoreReducer, "score", None, f"a tensor {MASK}, not NoneType"),
        (define, ScoreReducer, "score", np.ones((5, 16)), f"a tensor {MASK}, not ndarray"),
        (define, ScoreReducer, "score", torch.ones(16), f"a tensor {MASK}, not torch.float32 [16]"),
        (define, ScoreReducer, "score", torch.ones(5, 16) * 1j, f"a tensor {MASK}, not torch.complex64 [5, 16]"),
        (define, ScoreReducer, "score", torch.ones(5, 16, device="meta"), "torch.float32 [5, 16] on meta instead of"),
        (define, ScoreReducer, "score", torch.full((5, 16), torch.nan), "Mine.score returned NaN"),
        (define, DecoderScore, "score", [1.0], f"a tensor {MASK}, not list"),
        (define, TokenReducer, "select", [1], "Mine.select must return a Selection, not list"),
        (define, TokenReducer, "select", torch.ones(5, 16), "a Selection, not torch.float32 [5, 16]"),
        (define, DecoderReducer, "select", None, "Mine.select must return a Selection, not NoneType"),
        (define, TokenReducer, "select", build_user_selection(kept=[True]), f"a bool mask `kept` {MASK}, not list"),
        (define, TokenReducer, "select", build_user_selection(asked=None), "(`asked`) as a whole number, not NoneType"),
        (define, TokenReducer, "select", build_user_selection(mixing=[[1.0]]), "a mixing matrix of list; it must be"),
        (
            define,
            TokenReducer,
            "select",
            build_user_selection(mixing=torch.ones(1, 9)),
            "a mixing matrix of torch.float32 [1, 9]; it must be [kept, 80] (kept, sources)",
        ),
        (
            define,
            TokenReducer,
            "select",
            build_user_selection(order=[0]),
            "no permutation of the kept tokens, but list",
        ),
        (define, ImageReducer, "token_grid", 5, "Mine.token_grid must return (height, width) or None, not 5"),
        (define, ImageReducer, "token_grid", (2.5, 2), "Mine.token_grid must return (height, width) or None, not (2.5"),
        (compose, SelectionPolicy, "score", [1.0], f"a tensor {MASK}, not list"),
        (compose, PickingSelection, "pick", None, f"a bool mask {MASK}, not NoneType"),
        (compose, PickingSelection, "pick", torch.ones(5, 3), f"a bool mask {MASK}, not torch.float32 [5, 3]"),
        (compose, AllocationPolicy, "allocate", None, f"{NUMBERS} NoneType"),
        (compose, AllocationPolicy, "allocate", [16], f"{NUMBERS} [16]"),
        (compose, AllocationPolicy, "allocate", [-1] * 5, f"{NUMBERS} [-1, -1, -1, -1, -1]"),
        (compose, AllocationPolicy, "allocate", ["4"] * 5, f"{NUMBERS} ['4', '4', '4', '4', '4']"),
        (compose, AllocationPolicy, "allocate", torch.ones(4), "a tensor [tiles] = [5], not torch.float32 [4]"),
        (compose, ReservingMerging, "reserve", [1] * 5, "a tensor [tiles] = [5], not list"),
        (compose, MergingPolicy, "merge", (1, 2), "Mine.merge must return Merged(kind, weights), not tuple"),
        (compose, MergingPolicy, "merge", Merged(torch.ones(5), torch.ones(5)), f"a tensor {MASK}, not torch.float32"),
        (
            compose,
            MergingPolicy,
            "merge",
            Merged(torch.zeros(5, 16), torch.eye(16)),
            "[tiles, tokens, sources] = [5, 16, 16], not torch.float32 [16, 16]",
        ),
        (compose, OrderPolicy, "rank", [1], f"a tensor {MASK}, not list"),
        (compose, RelevancePolicy, "relevance", torch.ones(16), f"Mine.relevance must return a tensor {MASK}, not"),
    ],
)
def test_a_wrong_result_is_described(build: Any, base: type, method: str, result: Any, message: str) -> None:
    reducer = build(base, method, result)
    with pytest.raises((TypeError, ValueError)) as caught:
        reducer.with_options(budget=0.2).reduce(random_encoded_image(LAYOUT))
    line = define.__code__.co_firstlineno + 3
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"Mine.{method}")
    assert str(caught.value).endswith(f"(tests/core/test_contracts.py:{line})")


def test_a_saliency_model_returns_a_saliency_output() -> None:
    class Mine(SaliencyModel):
        name = "mine"

        def compute_attention(self, *args: Any) -> Any:
            return {}

    message = r"Mine.compute_attention must return a SaliencyOutput, not dict \(tests/core/test_contracts.py:\d+\)"
    with pytest.raises(TypeError, match=message):
        with_saliency(random_encoded_image(LAYOUT), Mine(), torch.ones(5, 3, 8, 8), (Signal("cls_attention"),))


def test_a_wrong_budget_names_the_class() -> None:
    @dataclass
    class Mine(ScoreReducer):
        budget: float = 2.0

        def score(self, image: Any) -> Any:
            raise AssertionError

    with pytest.raises(ValueError, match=r"Mine: budget 2.0 is neither .* \(tests/core/test_contracts.py:\d+\)"):
        Mine()


def test_valid_results_of_other_types_are_accepted() -> None:
    counts = [4, 3, 3, 3, 3]
    for granted in (counts, tuple(map(float, counts)), np.array(counts), torch.tensor(counts)):
        reducer = compose(AllocationPolicy, "allocate", granted)
        assert reducer.reduce(random_encoded_image(LAYOUT)).kept_per_tile == counts


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ("cls_attention", "not 'cls_attention'"),
        (Signal("cls_attention"), "not Signal(kind='cls_attention', layer='feature')"),
        (["cls_attention"], "not 'cls_attention'"),
        ((("cls_attention", "feature"),), "not ('cls_attention', 'feature')"),
        (None, "not None"),
        (lambda self: (Signal("cls_attention"),), "not a method; decorate it with @property"),
    ],
    ids=["text", "signal", "list of texts", "tuple", "None", "method"],
)
def test_needs_are_checked_in_the_constructor(needs: Any, message: str) -> None:
    for base, method in ((ScoreReducer, "score"), (SelectionPolicy, "score"), (AllocationPolicy, "allocate")):
        body = {"__module__": __name__, method: lambda self, *args: None, "needs": needs}
        with pytest.raises(TypeError) as caught:
            dataclass(type("Mine", (base,), body))()
        assert "Mine.needs must be a sequence of signals, such as (Signal(" in str(caught.value)
        assert message in str(caught.value)


def test_needs_may_read_attributes_that_a_subclass_sets_later() -> None:
    @dataclass
    class Late(ScoreReducer):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.layer = "first"

        @property
        def needs(self) -> Any:
            return (Signal("cls_attention", self.layer),)

        def score(self, image: Any) -> Any:
            raise AssertionError

    assert Late().needs == (Signal("cls_attention", "first"),)


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        ("clss_attention", "feature", r"no signal is called 'clss_attention' \(did you mean cls_attention\?\)"),
        ("last_text_atention", "before", r"no signal is called .*did you mean last_text_attention"),
        ("features", "feature", r"features is part of every image and no signal; remove Signal\('features'\)"),
        ("cls_attention", "frist", "layer='frist' is not known; use one of 'first', 'feature', 'before'"),
    ],
)
def test_a_misspelt_signal_is_refused(kind: str, layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Signal(kind, layer)


def test_signals_are_values() -> None:
    with pytest.raises(TypeError, match="declared by its name"):
        Signal(Signal("keys"))  # type: ignore[arg-type]
    assert Signal("keys", -1) == pickle.loads(pickle.dumps(Signal("keys", -1)))
    assert Signal("gaze") == Signal(kind="gaze", layer="feature")  # a signal of an adapter in a plug-in


def test_a_class_in_place_of_a_component_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no AllocationPolicy; pass an instance of a subclass, UniformAllocation\(\)"):
        HiRED(allocation=UniformAllocation)  # type: ignore[arg-type]
