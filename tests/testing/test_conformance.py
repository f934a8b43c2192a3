"""The conformance kit: shipped strategies pass, and each check alone catches the mistake that it is there for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.families import REPRESENTATIVES
from tokenprune import EncodedImage, ScoreReducer, Selection, Signal
from tokenprune.adapter import adapters
from tokenprune.catalog import strategies
from tokenprune.testing.conformance import CHECKS, LAYERS, check_reducer


@pytest.mark.parametrize(
    "families", [REPRESENTATIVES, pytest.param(None, marks=pytest.mark.slow)], ids=["representatives", "all families"]
)
@pytest.mark.parametrize("name", sorted(strategies()))
def test_shipped_strategies_pass(name: str, families: set[str] | None) -> None:
    report = check_reducer(strategies()[name](), families)  # type: ignore[call-arg]
    assert report.passed, str(report)
    assert all(result.passed for result in report.results), str(report)


@dataclass
class Norm(ScoreReducer):
    """A strategy that keeps every promise; the mistakes below derive from it."""

    def score(self, image: EncodedImage) -> Tensor:
        return image.features.float().norm(dim=-1)


@dataclass
class Attention(ScoreReducer):
    @property
    def needs(self) -> Sequence[Signal]:
        return (Signal("cls_attention", "feature"),)

    def score(self, image: EncodedImage) -> Tensor:
        return image.cls_attention("feature").sum(dim=1)


@dataclass
class OneShort(Norm):
    """Loses a token at one particular budget."""

    def select(self, image: EncodedImage) -> Selection:
        selection = super().select(image)
        if selection.asked == 7:
            selection.kept.view(-1)[selection.kept.flatten().nonzero()[0]] = False
        return selection


@dataclass
class GlobalSeed(Norm):
    """Draws from the global random state."""

    def score(self, image: EncodedImage) -> Tensor:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 1000)
        return torch.rand(image.features.shape[:2], generator=generator)


@dataclass
class Remembers(Norm):
    """Compares an image with the one before it of the same layout."""

    def score(self, image: EncodedImage) -> Tensor:
        last, self.__dict__["last"] = self.__dict__.get("last"), image
        if image.layers != LAYERS or last is None or last.geometry is not image.geometry:
            last = image
        return (image.features.float() * last.features.float()).sum(dim=-1)


@dataclass
class SquareOnly(Norm):
    """Fails on high images."""

    def score(self, image: EncodedImage) -> Tensor:
        if image.geometry.tile_grid == (3, 1) and image.layers == LAYERS:
            raise IndexError("576 is out of bounds")
        return super().score(image)


@dataclass
class LowPrecision(Attention):
    """Adds up in the precision that the signal comes in."""

    def score(self, image: EncodedImage) -> Tensor:
        attention = image.signals["cls_attention", image.feature_layer]
        return (attention + 8).sum(dim=1) - 8 * attention.shape[1]


@dataclass
class DividesByZero(Attention):
    """Normalizes by a sum that can be zero."""

    def score(self, image: EncodedImage) -> Tensor:
        attention = super().score(image)
        return attention / attention.sum()


@dataclass
class WritesIntoTheImage(Norm):
    """Works in place."""

    def score(self, image: EncodedImage) -> Tensor:
        return image.features.mul_(2).float().norm(dim=-1)


@dataclass
class AsksTooMuch(Norm):
    """Declares a signal that it does not read."""

    @property
    def needs(self) -> Sequence[Signal]:
        return (Signal("cls_attention", "first"),)


@dataclass
class AsksTooLittle(Norm):
    """Reads a signal that it does not declare."""

    def score(self, image: EncodedImage) -> Tensor:
        return image.cls_attention("first").sum(dim=1)


@dataclass
class HiddenSetting(Norm):
    """Has a setting that is no field."""

    sign = 1.0

    def score(self, image: EncodedImage) -> Tensor:
        return super().score(image) * self.sign


def hidden_setting() -> HiddenSetting:
    reducer = HiddenSetting()
    reducer.sign = -1.0
    return reducer


@dataclass
class LooksAtItsNeighbors(Attention):
    """Decides by whether other images were encoded beside this one."""

    def score(self, image: EncodedImage) -> Tensor:
        attention = image.signals["cls_attention", image.feature_layer].float()
        whole = attention if attention._base is None else attention._base
        return attention.sum(dim=1) * (1 if len(whole) == len(attention) else -1)


@dataclass
class SpoilsTheModel(Norm):
    """Changes weights and leaves them changed."""

    def __call__(self, model: Any) -> Any:
        return self.spoiling(model)

    @contextmanager
    def spoiling(self, model: Any) -> Iterator[Any]:
        with super().__call__(model) as run:
            yield run
        model.get_output_embeddings().weight.data.mul_(2)


@dataclass
class Backwards(Norm):
    """Hands tokens over from last to first."""

    def select(self, image: EncodedImage) -> Selection:
        selection = super().select(image)
        return replace(selection, order=torch.arange(selection.kept_tokens).flip(0))


MISTAKES = {
    "exact budget": OneShort(),
    "deterministic": GlobalSeed(),
    "stateless": Remembers(),
    "layouts": SquareOnly(),
    "spatial order": Backwards(),
    "precision": LowPrecision(),
    "extreme signals": DividesByZero(),
    "inputs unchanged": WritesIntoTheImage(),
    "needs": AsksTooMuch(),
    "round trips": hidden_setting(),
    "batch invariant": LooksAtItsNeighbors(),
    "leaves no trace": SpoilsTheModel(),
}


def test_there_is_a_mistake_for_every_check() -> None:
    assert list(MISTAKES) == list(CHECKS)
    for reducer in (Norm(), Attention()):
        assert all(result.passed for result in check_reducer(reducer, REPRESENTATIVES).results)


@pytest.mark.parametrize("name", MISTAKES)
def test_only_its_check_catches_a_mistake(name: str) -> None:
    report = check_reducer(MISTAKES[name], REPRESENTATIVES)
    assert [result.name for result in report.results if result.passed is False] == [name], str(report)
    assert not report.passed
    (failed,) = [result for result in report.results if not result.passed]
    assert "expected" in failed.detail
    assert "got" in failed.detail
    assert "\n" not in failed.detail


def test_an_undeclared_signal_is_named() -> None:
    failed = {r.name: r.detail for r in check_reducer(AsksTooLittle(), REPRESENTATIVES).results if r.passed is False}
    assert "cls_attention of layer 0 was not captured" in failed["needs"]


def test_a_signal_that_no_model_gives_is_not_held_against_a_strategy() -> None:
    @dataclass
    class Wishful(Norm):
        @property
        def needs(self) -> Sequence[Signal]:
            return (Signal("gaze", "first"),)

        def score(self, image: EncodedImage) -> Tensor:
            return image.read(Signal("gaze", "first"))[..., 0]

    results = {result.name: result for result in check_reducer(Wishful(), REPRESENTATIVES).results}
    assert results["batch invariant"].passed is None
    assert "no adapter provides gaze" in results["batch invariant"].detail
    assert results["exact budget"].passed


def test_checking_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_reducer(Norm(), REPRESENTATIVES)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", sorted(adapters()))
def test_example_models_are_small_and_the_same_each_time(name: str) -> None:
    kind = adapters()[name]
    one, other = kind.example(), kind.example()
    assert kind.matches(one)
    assert sum(p.numel() for p in one.parameters()) < 500_000
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    inputs = kind(one).example_inputs([[(112, 112)], [(60, 160), (40, 40)], []])
    assert not kind.supports_transformers() or one(**inputs).logits.isfinite().all()
    assert dataclasses.is_dataclass(kind(one).llm)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no family is called lava; known: .*llava_next"):
        check_reducer(Norm(), ["lava"])
