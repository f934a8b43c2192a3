"""QuestionFirst: greedy picks by weight times distance; the weights contain saliency and the relevance of neighbors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from research.tried_selections import TopWeightSelection, first_version
from tokenprune.budget import Budget
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.policies import RelevancePolicy
from tokenprune.strategies import DivPrune, QuestionFirst
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import max_min_diverse
from tokenprune.strategies.components.relevance import AttentionRelevance, standardize
from tokenprune.strategies.question_first import QuestionFirstSelection
from tokenprune.testing.encoded_images import random_encoded_image

GEOMETRY = TileGeometry.anyres((90, 160), (1, 2), (10, 10), 80)


class Spikes(RelevancePolicy):
    """A relevance of 0, and of 5, 6, 7, ... at some tokens."""

    spikes = (3, 50, 51, 80, 90)

    def relevance(self, image: EncodedImage) -> Tensor:
        values = torch.zeros(image.geometry.tiles, image.geometry.tokens)
        values[0, list(self.spikes)] = 5.0 + torch.arange(len(self.spikes))
        return values


def make_reducer(budget: float | int | Budget, **options: Any) -> QuestionFirst:
    return QuestionFirst(budget, selection=QuestionFirstSelection(relevance=Spikes(), **options))


def list_kept(reducer: QuestionFirst | DivPrune, image: EncodedImage) -> list[int]:
    """Return the indices of the kept tokens in the pool of all tiles."""
    geometry = image.geometry
    return reducer.reduce(image).kept.flatten()[geometry.token_order].nonzero()[:, 0].tolist()


def weigh(image: EncodedImage, neighbors: int, threshold: float, weight: float, power: float) -> list[float]:
    """Return the weight of each token of the pool, written as loops."""
    flat = image.flatten_tiles()
    saliency = AttentionRelevance().relevance(flat)[0].tolist()
    order = sorted(range(len(saliency)), key=saliency.__getitem__)
    relevance = Spikes().relevance(flat)[0].tolist()
    near = [max(relevance[max(0, i - neighbors) : i + neighbors + 1]) for i in range(len(relevance))]
    mean = sum(near) / len(near)
    spread = math.sqrt(sum((value - mean) ** 2 for value in near) / len(near))
    return [
        ((order.index(i) + 1) / len(near)) ** power + weight * max(0, (near[i] - mean) / spread - threshold)
        for i in range(len(near))
    ]


def pick(image: EncodedImage, weights: list[float], number: int) -> list[int]:
    """Return the tokens with the largest weight times distance, one by one, written as loops."""
    features = torch.nn.functional.normalize(image.flatten_tiles().features[0].double(), dim=-1)
    distances = (1 - features @ features.T).tolist()
    tokens = range(len(weights))
    isolation = [min(distances[i][j] for j in tokens if j != i) for i in tokens]
    picks = [max(tokens, key=lambda i: weights[i] * isolation[i])]
    while len(picks) < number:
        remaining = (i for i in tokens if i not in picks)
        picks.append(max(remaining, key=lambda i: weights[i] * min(distances[i][j] for j in picks)))
    return picks


@pytest.fixture
def image() -> EncodedImage:
    return random_encoded_image(GEOMETRY, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"neighbors": 1, "threshold": 1.0, "weight": 2.0, "power": 0.5},
        {"neighbors": 0, "threshold": 0.0, "weight": 0.5, "power": 1.0},
        {"neighbors": 3, "threshold": 2.0, "weight": 4.0, "power": 0.0},
    ],
)
def test_each_pick_has_the_largest_product_of_weight_and_distance(image: EncodedImage, options: dict[str, Any]) -> None:
    expected = pick(image, weigh(image, **options), 30)
    assert set(list_kept(make_reducer(30, **options), image)) == set(expected)


def test_equal_weights_are_divprune(image: EncodedImage) -> None:
    assert list_kept(make_reducer(30, weight=0.0, power=0.0), image) == list_kept(DivPrune(30), image)


@pytest.mark.parametrize("neighbors", [0, 1, 2])
def test_neighbors_of_relevant_tokens_are_preferred(image: EncodedImage, neighbors: int) -> None:
    relevant = {i + step for i in Spikes.spikes for step in range(-neighbors, neighbors + 1)}
    assert (
        set(list_kept(make_reducer(len(relevant), neighbors=neighbors, threshold=0.0, weight=1e6), image)) == relevant
    )


def test_values_at_padding_have_no_influence() -> None:
    image = random_encoded_image(TileGeometry.anyres((90, 160), (2, 2), (10, 10), 80), 0)
    valid = image.geometry.valid
    assert not valid.all()

    class AtPadding(RelevancePolicy):
        def relevance(self, image: EncodedImage) -> Tensor:
            return torch.where(valid, torch.arange(valid.numel()).view(valid.shape) % 7, self.value)

    kept = []
    for AtPadding.value in (-1e6, 1e6):
        selection = QuestionFirstSelection(relevance=AtPadding(), saliency=AtPadding())
        kept.append(QuestionFirst(0.2, selection=selection, allocation=UniformAllocation()).reduce(image).kept)
    assert torch.equal(*kept)


def test_ranks_count_valid_tokens_only() -> None:
    image = random_encoded_image(TileGeometry.anyres((90, 160), (2, 2), (10, 10), 80), 0)
    weights = QuestionFirstSelection(relevance=Spikes(), weight=0.0, power=1.0).score(image)
    for values, valid in zip(weights, image.geometry.valid, strict=True):
        count = int(valid.sum())
        assert values[valid].sort().values.tolist() == pytest.approx([(i + 1) / count for i in range(count)])


@pytest.mark.parametrize("name", ["neighbors", "threshold", "weight", "power"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_an_impossible_option_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be a finite .*number, 0 or larger"):
        QuestionFirstSelection(**{name: value})


def test_half_a_neighbor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"neighbors=1.5 must be a finite whole number"):
        QuestionFirstSelection(neighbors=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 1, 7, GEOMETRY.valid_tokens])
def test_the_budget_is_spent_exactly(image: EncodedImage, number: int) -> None:
    assert len(list_kept(make_reducer(number), image)) == number


def test_values_are_standardized_per_tile_over_valid_tokens() -> None:
    values = torch.tensor([[1.0, 3.0, 900.0], [5.0, 5.0, 5.0]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert standardize(values, valid).tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1 / 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_values_are_standardized_to_zero(value: float, dtype: torch.dtype) -> None:
    values = torch.full((1, 2880), value, dtype=dtype)
    assert not standardize(values, torch.ones(1, 2880, dtype=torch.bool)).any()


def test_weights_of_zero_or_below_pick_each_token_once() -> None:
    features = torch.randn(6, 8)
    for weights in (torch.zeros(6), -torch.ones(6), torch.tensor([1.0, 0, 0, 0, 0, 0])):
        assert sorted(max_min_diverse(features, 6, weights=weights).tolist()) == list(range(6))


def test_weights_apply_to_candidates_only() -> None:
    candidates = torch.tensor([True, False, True, False, True, False])
    weights = torch.tensor([1.0, 1e9, 1.0, torch.inf, 1e6, -torch.inf])
    picks = max_min_diverse(torch.randn(6, 8), 3, candidates, weights)
    assert picks[0] == 4
    assert sorted(picks.tolist()) == [0, 2, 4]


def test_variants_of_the_search_reduce_an_image() -> None:
    image = random_encoded_image(GEOMETRY, 0)
    for selection in (TopWeightSelection(relevance=Spikes()), first_version(relevance=Spikes()).selection):
        assert len(list_kept(QuestionFirst(12, selection=selection), image)) == 12
