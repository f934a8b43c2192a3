"""The conformance checks: shipped strategies pass, and each mistake fails exactly one check."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.families import REPRESENTATIVES
from tokenprune import EncodedImage, PatchDropReducer, PatchGroups, PatchMergeReducer, ScoreReducer, Selection, Signal
from tokenprune.adapter import adapters
from tokenprune.catalog import strategies
from tokenprune.decoder_reducer import AtLayer, DecoderReducer, ScheduledReducer
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.strategies import ToMe
from tokenprune.testing.check_errors import CheckError
from tokenprune.testing.conformance import (
    CHECKS,
    LAYERS,
    LAYOUTS,
    MODEL_CHECKS,
    build_image,
    check_precision,
    check_reducer,
)
from tokenprune.testing.encoder_checks import ENCODER_CHECKS
from tokenprune.testing.examples import build_example, find_example

THREE_FAMILIES = {"llava_next", "gemma3", "qwen2_5_vl"}
"""Tiles with CLS attention, crops, and native resolution. The checks of all families run with ``-m slow``."""


@pytest.mark.parametrize(
    "families", [THREE_FAMILIES, pytest.param(None, marks=pytest.mark.slow)], ids=["three families", "all families"]
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("EViT", "RandomPatches") else name
        for name in sorted(strategies())
    ],
)
def test_shipped_strategies_pass(name: str, families: set[str] | None) -> None:
    reducer = strategies()[name]()  # type: ignore[call-arg]
    if isinstance(reducer, ScheduledReducer):  # the LLMs of the examples have few layers
        reducer = reducer.with_options(schedule=((1, 0.5),))
    elif isinstance(reducer, DecoderReducer):
        reducer = reducer.with_options(layer=1)
    report = check_reducer(reducer, families)
    assert report.passed, str(report)
    not_applicable = {result.name for result in report.results if result.passed is None}
    assert not_applicable == (set() if isinstance(reducer, DecoderReducer) else {"cuts"}), str(report)


@dataclass
class NormScore(ScoreReducer):
    """A correct strategy; the strategies with mistakes below derive from it."""

    def score(self, image: EncodedImage) -> Tensor:
        return image.features.float().norm(dim=-1)


@dataclass
class AttentionScore(ScoreReducer):
    @property
    def needs(self) -> Sequence[Signal]:
        return (Signal("cls_attention", "feature"),)

    def score(self, image: EncodedImage) -> Tensor:
        return image.cls_attention("feature").sum(dim=1)


@dataclass
class MissingToken(NormScore):
    """Keeps one token too few at a budget of 7."""

    def select(self, image: EncodedImage) -> Selection:
        selection = super().select(image)
        if selection.asked == 7:
            selection.kept.view(-1)[selection.kept.flatten().nonzero()[0]] = False
        return selection


@dataclass
class GlobalSeed(NormScore):
    """Draws scores from the global random state."""

    def score(self, image: EncodedImage) -> Tensor:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 1000)
        return torch.rand(image.features.shape[:2], generator=generator)


@dataclass
class KeepsState(NormScore):
    """Compares an image with the previous image of the same layout."""

    def score(self, image: EncodedImage) -> Tensor:
        last, self.__dict__["last"] = self.__dict__.get("last"), image
        if image.layers != LAYERS or last is None or last.geometry is not image.geometry:
            last = image
        return (image.features.float() * last.features.float()).sum(dim=-1)


@dataclass
class SquareOnly(NormScore):
    """Raises for tall images."""

    def score(self, image: EncodedImage) -> Tensor:
        if image.geometry.tile_grid == (3, 1) and image.layers == LAYERS:
            raise IndexError("576 is out of bounds")
        return super().score(image)


@dataclass
class LowPrecision(AttentionScore):
    """Sums attention in the precision of the signal."""

    def score(self, image: EncodedImage) -> Tensor:
        attention = image.signals["cls_attention", image.feature_layer]
        return (attention + 8).sum(dim=1) - 8 * attention.shape[1]


@dataclass
class DividesByZero(AttentionScore):
    """Normalizes by a sum that can be zero."""

    def score(self, image: EncodedImage) -> Tensor:
        attention = super().score(image)
        return attention / attention.sum()


@dataclass
class ModifiesImage(NormScore):
    """Modifies the features of the image in place."""

    def score(self, image: EncodedImage) -> Tensor:
        return image.features.mul_(2).float().norm(dim=-1)


@dataclass
class UnreadSignal(NormScore):
    """Declares a signal that it does not read."""

    @property
    def needs(self) -> Sequence[Signal]:
        return (Signal("cls_attention", "first"),)


@dataclass
class UndeclaredSignal(NormScore):
    """Reads a signal that it does not declare."""

    def score(self, image: EncodedImage) -> Tensor:
        return image.cls_attention("first").sum(dim=1)


@dataclass
class HiddenSetting(NormScore):
    """Has a setting that is not a dataclass field."""

    sign = 1.0

    def score(self, image: EncodedImage) -> Tensor:
        return super().score(image) * self.sign


def build_hidden_setting() -> HiddenSetting:
    """Return a reducer whose setting differs from the default."""
    reducer = HiddenSetting()
    reducer.sign = -1.0
    return reducer


@dataclass
class DependsOnBatch(AttentionScore):
    """Reverses its scores if other images are in the same batch."""

    def score(self, image: EncodedImage) -> Tensor:
        attention = image.signals["cls_attention", image.feature_layer].float()
        batch = attention if attention._base is None else attention._base
        return attention.sum(dim=1) * (1 if len(batch) == len(attention) else -1)


@dataclass
class ModifiesWeights(NormScore):
    """Changes weights of the model and does not restore them."""

    def __call__(self, model: Any) -> Any:
        return self.attach_and_modify(model)

    @contextmanager
    def attach_and_modify(self, model: Any) -> Iterator[Any]:
        with super().__call__(model) as run:
            yield run
        model.get_output_embeddings().weight.data.mul_(2)


@dataclass
class ReverseOrder(NormScore):
    """Returns tokens in reverse order."""

    def select(self, image: EncodedImage) -> Selection:
        selection = super().select(image)
        return replace(selection, order=torch.arange(selection.kept_tokens).flip(0))


@dataclass
class LargestPatches(PatchDropReducer):
    """A correct strategy inside the vision tower; the strategies with mistakes below derive from it."""

    def score(self, image: EncodedImage) -> Tensor:
        return image.features.float().norm(dim=-1)


@dataclass
class RepeatedPatch(LargestPatches):
    """Keeps the first patch twice."""

    def group(self, image: EncodedImage, number: int) -> PatchGroups:
        kept = super().group(image, number).kept
        return PatchGroups(torch.cat([kept[:, :1], kept[:, :-1]], dim=1))


@dataclass
class WrongShape(LargestPatches):
    """Returns one patch too few."""

    def group(self, image: EncodedImage, number: int) -> PatchGroups:
        return PatchGroups(super().group(image, number).kept[:, 1:])


@dataclass
class WrongScores(LargestPatches):
    """Returns one score per tile."""

    def score(self, image: EncodedImage) -> Tensor:
        return super().score(image).mean(dim=1)


@dataclass
class ComparesTiles(LargestPatches):
    """Subtracts the mean of all tiles of the call."""

    def score(self, image: EncodedImage) -> Tensor:
        return (image.features.float() - image.features.float().mean(dim=0)).norm(dim=-1) + super().score(image) / 1e6


@dataclass
class StrayGroups(PatchMergeReducer):
    """Merges all patches into the first, also the patches that are kept."""

    def metric(self, image: EncodedImage) -> Tensor:
        return image.features

    def match(self, image: EncodedImage, metric: Tensor, number: int) -> PatchGroups:
        kept = torch.arange(number).expand(len(metric), -1)
        return PatchGroups(kept, torch.zeros(metric.shape[:2], dtype=torch.long))


ENCODER_MISTAKES: list[tuple[EncoderReducer, str, str]] = [
    (RepeatedPatch(), "patch groups", "RepeatedPatch.group on one tile with 18 of 36 patches: expected kept with 18"),
    (WrongShape(), "patch groups", "WrongShape.group must return kept of shape [1, 1], not [1, 0]"),
    (WrongScores(), "patch groups", "WrongScores.score must return [tiles, patches] = [1, 36], not [1]"),
    (ComparesTiles(), "single tiles", "expected the same groups of tile 1 in a call of its own"),
    (StrayGroups(), "patch groups", "got 17 kept patches in another group"),
]


@pytest.mark.parametrize(("reducer", "check", "message"), ENCODER_MISTAKES, ids=lambda value: str(value)[:12])
def test_mistakes_inside_the_vision_tower_are_named(reducer: EncoderReducer, check: str, message: str) -> None:
    images = {name: build_image(reducer, layout) for name, layout in LAYOUTS.items()}
    with pytest.raises(CheckError, match=re.escape(message)):
        ENCODER_CHECKS[check](reducer, images)


def test_checks_of_a_strategy_inside_the_vision_tower() -> None:
    report = check_reducer(LargestPatches(), ["llava"])
    assert report.passed, str(report)
    assert {*ENCODER_CHECKS, "all patches"} < {result.name for result in report.results if result.passed}
    merging = {r.name: r.detail for r in check_reducer(ToMe(), ["qwen2_5_vl"]).results if r.passed is None}
    assert merging["batch invariant"] == "no adapter provides keys and steps that merge patches"


MISTAKES = {
    "exact budget": MissingToken(),
    "deterministic": GlobalSeed(),
    "stateless": KeepsState(),
    "layouts": SquareOnly(),
    "spatial order": ReverseOrder(),
    "precision": LowPrecision(),
    "extreme signals": DividesByZero(),
    "inputs unchanged": ModifiesImage(),
    "needs": UnreadSignal(),
    "round trips": build_hidden_setting(),
    "batch invariant": DependsOnBatch(),
    "cuts": NormScore(0.5) >> AtLayer(1, MissingToken(0.3)),
    "leaves no trace": ModifiesWeights(),
}


def test_each_check_has_a_mistake() -> None:
    assert list(MISTAKES) == list(CHECKS)
    for reducer in (NormScore(), AttentionScore()):
        results = check_reducer(reducer, REPRESENTATIVES).results
        assert all(result.passed for result in results if result.name != "cuts")
    for decoder_reducer in (AtLayer(1, NormScore(0.5)), AttentionScore(0.5) >> AtLayer(0.5, AttentionScore(0.5))):
        assert all(result.passed for result in check_reducer(decoder_reducer, REPRESENTATIVES).results)
    results = check_reducer(AtLayer(9, NormScore()), REPRESENTATIVES).results
    assert {result.name for result in results if result.passed is None} == MODEL_CHECKS


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_only_its_check(name: str) -> None:
    report = check_reducer(MISTAKES[name], REPRESENTATIVES)
    assert [result.name for result in report.results if result.passed is False] == [name], str(report)
    assert not report.passed
    (failed,) = [result for result in report.results if result.passed is False]
    assert {result.name for result in report.results if result.passed is None} == {"cuts"} - {name}
    assert "expected" in failed.detail
    assert "got" in failed.detail
    assert "\n" not in failed.detail


@dataclass
class ScoresAsList(NormScore):
    """Returns a list instead of a tensor."""

    def score(self, image: EncodedImage) -> Any:
        return super().score(image).tolist()


def test_a_cause_is_reported_once_with_file_and_line_and_number_of_layouts() -> None:
    names: list[str] = []
    report = check_reducer(ScoresAsList(), ["llava_next"], names.append)
    failed = {result.name: result.detail for result in report.results if result.passed is False}
    assert names == list(CHECKS)
    line = ScoresAsList.score.__code__.co_firstlineno
    assert failed == {
        "layouts": "reduced 4 of 4 layouts: expected a selection, got TypeError: ScoresAsList.score must return a "
        f"tensor [tiles, tokens] = [1, 36], not list (tests/testing/test_conformance.py:{line})",
        "batch invariant": "the same error as in `layouts`",
        "leaves no trace": "the same error as in `layouts`",
    }


def test_a_failure_of_precision_suggests_float32() -> None:
    with pytest.raises(CheckError, match=r"different decisions for .*; compute scores in float32, such as image\.feat"):
        check_precision(LowPrecision())


def test_an_undeclared_signal_is_named() -> None:
    failed = {
        result.name: result.detail
        for result in check_reducer(UndeclaredSignal(), REPRESENTATIVES).results
        if result.passed is False
    }
    assert "cls_attention of layer 0 was not captured" in failed["needs"]


def test_checks_of_a_signal_that_no_adapter_provides_are_skipped() -> None:
    @dataclass
    class UnknownSignal(NormScore):
        @property
        def needs(self) -> Sequence[Signal]:
            return (Signal("gaze", "first"),)

        def score(self, image: EncodedImage) -> Tensor:
            return image.read(Signal("gaze", "first"))[..., 0]

    results = {result.name: result for result in check_reducer(UnknownSignal(), REPRESENTATIVES).results}
    assert results["batch invariant"].passed is None
    assert "no adapter provides gaze" in results["batch invariant"].detail
    assert results["exact budget"].passed


def test_checks_do_not_change_the_global_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_reducer(NormScore(), REPRESENTATIVES)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", sorted(adapters()))
def test_example_models_are_small_and_deterministic(name: str) -> None:
    kind = adapters()[name]
    example, second_model = build_example(kind), find_example(kind).build_model()
    model = example.adapter.model
    assert kind.matches(model)
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    text = model.config.get_text_config()  # transformers warns about special tokens outside of the vocabulary
    assert {getattr(text, name, None) for name in ("bos_token_id", "eos_token_id")} <= {None, *range(text.vocab_size)}
    pairs = zip(model.parameters(), second_model.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)
    inputs = example.build_inputs([[(112, 112)], [(60, 160), (40, 40)], []])
    assert not kind.supports_transformers() or model(**inputs).logits.isfinite().all()
    assert dataclasses.is_dataclass(kind(model).llm)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no family is called lava; the families are .*llava_next"):
        check_reducer(NormScore(), ["lava"])
