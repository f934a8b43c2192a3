"""Greedy selections against their plain definitions, and the measurement of what selections cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.published import CASES, Case
from tokenprune.catalog import strategies
from tokenprune.experiments.bench.selection_cost import (
    BY_ATTENTION,
    Cost,
    ModelSize,
    build_random_image,
    format_costs,
    measure_strategies,
)
from tokenprune.image import Signal
from tokenprune.strategies.components.diversity import (
    facility_location,
    greedy_dpp,
    important_then_diverse,
    lazy_coverage,
    max_min_diverse,
    pairwise_cosine,
    saliency_coverage,
)
from tokenprune.strategies.tops import optimal_preservation

# --- plain definitions: everything is looked at in every step ---------------------------------------------------------


def plain_coverage(similarity: Tensor, saliency: Tensor, weights: Tensor, number: int) -> list[int]:
    picks: list[int] = []
    covered, taken = torch.zeros(len(saliency)), torch.zeros(len(saliency), dtype=torch.bool)
    for _ in range(number):
        gain = saliency * ((similarity - covered).clamp(min=0) * weights).sum(dim=1)
        picks.append(int(gain.masked_fill(taken, -torch.inf).argmax()))
        taken[picks[-1]] = True
        covered = torch.maximum(covered, similarity[picks[-1]])
    return picks


def plain_max_min(features: Tensor, number: int) -> list[int]:
    distance = 1 - pairwise_cosine(features)
    picks = [int(distance.sort(dim=1).values[:, :2][:, -1].argmax())]
    while len(picks) < number:
        nearest = distance[picks].amin(dim=0)
        nearest[picks] = -torch.inf
        picks.append(int(nearest.argmax()))
    return picks


def plain_important_then_diverse(features: Tensor, scores: Tensor, number: int, important: int) -> list[int]:
    similarity, order = pairwise_cosine(features), scores.argsort(descending=True, stable=True).tolist()
    rest, diverse = order[important:], number - important
    while diverse and len(rest) > diverse:
        even, odd = rest[0::2], rest[1::2]
        likeness = [max(float(similarity[one, other]) for other in odd) for one in even]
        fallen = sorted(range(len(even)), key=lambda place: -likeness[place])
        rest = [even[place] for place in fallen[min(8, len(rest) - diverse) :]] + odd
    return order[:important] + rest[:diverse]


def plain_determinantal(features: Tensor, relevance: Tensor, number: int) -> list[int]:
    """The set grows by the token that makes the determinant of its part of the kernel largest."""
    unit = F.normalize(features.double(), dim=-1) * relevance.double()[:, None]
    kernel, picks = unit @ unit.T, list[int]()
    for _ in range(number):
        free = [token for token in range(len(features)) if token not in picks]
        picks.append(max(free, key=lambda token: float(kernel[[*picks, token]][:, [*picks, token]].det())))
    return picks


@st.composite
def tokens(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Features with repeated and zero vectors, a weight per token with ties and zeros, and how many to pick."""
    number, dim, seed = draw(st.integers(1, 40)), draw(st.integers(1, 8)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(number, dim, generator=generator)
    features[torch.rand(number, generator=generator) < draw(st.sampled_from([0, 0.2]))] = 0
    if draw(st.booleans()):
        features = features[torch.randint(0, number, (number,), generator=generator)]
    weights = torch.rand(number, generator=generator)
    weights = (4 * weights).floor() if draw(st.booleans()) else weights
    return features, weights, draw(st.integers(0, number))


@settings(deadline=None)
@given(drawn=tokens(), batch=st.integers(1, 50), sign=st.booleans())
def test_lazy_coverage_picks_what_the_plain_greedy_picks(drawn, batch: int, sign: bool) -> None:
    """For any size of the first batch, and where tokens of negative saliency come last."""
    features, weights, number = drawn
    saliency, ones = weights - 1 if sign else weights, torch.ones(len(features))
    plain = plain_coverage(pairwise_cosine(features), saliency, ones, number)
    assert lazy_coverage(pairwise_cosine(features), number, saliency=saliency, batch=batch).tolist() == plain
    assert saliency_coverage(features, saliency, number).tolist() == plain
    plain = plain_coverage(pairwise_cosine(features), ones, weights, number)
    assert lazy_coverage(pairwise_cosine(features), number, weights=weights, batch=batch).tolist() == plain
    shifted = (1 + pairwise_cosine(features)) / 2
    assert facility_location(features, weights, number).tolist() == plain_coverage(shifted, ones, weights, number)


@settings(deadline=None)
@given(drawn=tokens(), share=st.floats(0, 1))
def test_diverse_picks_equal_the_plain_ones(drawn, share: float) -> None:
    features, scores, number = drawn
    picks = max_min_diverse(features, number).tolist()
    assert picks == (plain_max_min(features, number) if number else [])
    important = int(share * number)
    kept = important_then_diverse(features, scores, number, important).tolist()
    assert kept == plain_important_then_diverse(features, scores, number, important)


@pytest.mark.parametrize("number", CASES)
def test_lazy_coverage_on_recorded_tiles(number: int) -> None:
    case = Case("scope", number)
    features, saliency, ones = case["features"][0], case["attention"][0].sum(0), torch.ones(576)
    cosine = pairwise_cosine(features)
    assert saliency_coverage(features, saliency, 120).tolist() == plain_coverage(cosine, saliency, ones, 120)
    assert facility_location(features, saliency, 120).tolist() == plain_coverage((1 + cosine) / 2, ones, saliency, 120)


def test_facility_location_covers_what_weighs_most() -> None:
    features = torch.eye(3)[[0, 0, 0, 1, 1, 2]]
    ones = torch.ones(6)
    assert facility_location(features, ones, 3).tolist() == [0, 3, 5]
    assert facility_location(features, torch.tensor([1.0, 1, 1, 0, 0, 9]), 2).tolist() == [5, 0]
    assert facility_location(features, torch.tensor([-1.0, -1, 1, 0, 0, 9]), 2).tolist() == [5, 0]
    assert facility_location(features, ones, 6).tolist() == [0, 3, 5, 1, 2, 4]  # nothing left to gain: in order


class Copies(TorchDispatchMode):
    """Counts the new tensors of at least `size` numbers that are made meanwhile; views are none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        made = [one for one in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(one, Tensor)]
        self.count += sum(one.numel() >= self.size and one.untyped_storage().data_ptr() not in known for one in made)
        return out


GREEDY: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "DivPrune": lambda features, scores, number: max_min_diverse(features, number),
    "SCOPE": saliency_coverage,
    "EADP": facility_location,
    "CDPruner": greedy_dpp,
    "VisPruner": lambda features, scores, number: important_then_diverse(features, scores, number, number // 2),
    "TOPS": lambda features, scores, number: optimal_preservation(features, scores, number, 0.5, 0.5),
}


@pytest.mark.parametrize("name", GREEDY)
def test_no_step_copies_a_large_part_of_the_similarities(name: str) -> None:
    """Large tensors are made once, before the first pick, and no step makes another."""
    generator = torch.Generator().manual_seed(0)
    features, scores = torch.randn(600, 8, generator=generator), torch.rand(600, generator=generator)
    counts = []
    for number in (20, 100):
        with Copies(600 * 600 // 5) as copies:
            GREEDY[name](features, scores, number)
        counts.append(copies.count)
    assert counts[0] == counts[1] <= 3


# --- determinantal point process --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), number=st.integers(0, 6))
def test_determinantal_maximizes_the_volume_step_by_step(seed: int, number: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features, relevance = torch.randn(15, 12, generator=generator), 0.1 + torch.rand(15, generator=generator)
    assert greedy_dpp(features, relevance, number).tolist() == plain_determinantal(features, relevance, number)


@settings(deadline=None)
@given(drawn=tokens())
def test_determinantal_picks_every_number_whatever_the_rank(drawn) -> None:
    features, relevance, number = drawn
    picks = greedy_dpp(features, relevance, number)
    assert picks.dtype == torch.long
    assert len(set(picks.tolist())) == len(picks) == number
    assert torch.equal(picks, greedy_dpp(features, relevance, number))


def test_determinantal_goes_on_by_relevance_when_the_features_span_no_more() -> None:
    features = torch.eye(3)[[0, 0, 0, 1, 1, 2]]
    relevance = torch.tensor([0.5, 0.9, 0.7, 0.8, 0.6, 0.4])
    assert greedy_dpp(features, relevance, 6).tolist() == [1, 3, 5, 2, 4, 0]
    assert greedy_dpp(features, torch.ones(6), 6).tolist() == [0, 3, 5, 1, 2, 4]
    assert greedy_dpp(torch.zeros(4, 3), torch.tensor([0.1, 0.4, 0.2, 0.3]), 3).tolist() == [1, 3, 2]
    assert greedy_dpp(torch.ones(4, 3), torch.tensor([0.0, 0.0, 0.0, 1.0]), 2).tolist() == [3, 0]


def test_determinantal_tells_relevant_from_different() -> None:
    """Twins of the most relevant token come last, however relevant, and however small the others' relevance."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 64, generator=generator)
    features[:10] = features[0]
    relevance = torch.cat([torch.ones(10), torch.full((10,), 1e-6)])
    picks = greedy_dpp(features, relevance, 13).tolist()
    assert picks[0] < 10
    assert sorted(picks[1:11]) == list(range(10, 20))
    assert picks[11:] == [token for token in range(10) if token != picks[0]][:2]


# --- the measurement --------------------------------------------------------------------------------------------------

TINY = ModelSize(side=4, patch=2, layers=4, heads=2, width=8, intermediate=8, shared=6, dim=10)


def test_every_strategy_can_be_measured() -> None:
    threads = torch.get_num_threads()
    costs = measure_strategies(repeats=2, threads=1, size=TINY)
    assert [cost.name for cost in costs] == list(strategies())
    assert all(len(cost.select_ms) == len(cost.encode_ms) == 2 for cost in costs)
    assert all(value > 0 for cost in costs for value in (*cost.select_ms, *cost.encode_ms))
    assert torch.get_num_threads() == threads
    assert len(format_costs(costs).splitlines()) == 4 + len(costs)


def test_targets() -> None:
    quick, slow = Cost("HiRED", (1.9, 9.0, 1.0), (10.0, 90.0, 20.0)), Cost("HiRED", (2.0,), (1000.0,))
    small, large = Cost("SCOPE", (9.0,), (100.0,)), Cost("SCOPE", (10.0,), (100.0,))
    assert [cost.is_met for cost in (quick, slow, small, large)] == [True, False, True, False]
    assert quick.share == 10.0
    assert "| HiRED | 1.90 [1.00, 9.00] | 10.00 | < 2 ms | yes |" in format_costs([quick])
    assert "| SCOPE | 10.00 [10.00, 10.00] | 10.00 | < 10 % | no |" in format_costs([large])
    assert set(strategies()) >= BY_ATTENTION


def test_unknown_strategies_and_signals_are_named() -> None:
    with pytest.raises(LookupError, match=r"no strategy is called 'HiRAD'. Did you mean HiRED"):
        measure_strategies(["HiRAD"], size=TINY)
    with pytest.raises(ValueError, match="cannot build the signal 'echo'"):
        build_random_image(TINY, [Signal("echo", "feature")])
