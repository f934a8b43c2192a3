"""Greedy selections against their plain definitions, and the measurement of the time of selections."""

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
    SelectionCostConfig,
    build_random_image,
    format_costs,
    measure_strategies,
)
from tokenprune.image import Signal
from tokenprune.strategies.components.diversity import (
    facility_location,
    greedy_coverage,
    greedy_dpp,
    important_then_diverse,
    lazy_coverage,
    max_min_diverse,
    pairwise_cosine,
    saliency_coverage,
)
from tokenprune.strategies.tops import optimal_preservation

# --- plain definitions: each step compares all tokens -----------------------------------------------------------------


def plain_coverage(similarity: Tensor, saliency: Tensor, weights: Tensor, number: int) -> list[int]:
    picks: list[int] = []
    covered, is_picked = torch.zeros(len(saliency)), torch.zeros(len(saliency), dtype=torch.bool)
    for _ in range(number):
        gain = saliency * ((similarity - covered).clamp(min=0) * weights).sum(dim=1)
        picks.append(int(gain.masked_fill(is_picked, -torch.inf).argmax()))
        is_picked[picks[-1]] = True
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
    remaining, diverse = order[important:], number - important
    while diverse and len(remaining) > diverse:
        even, odd = remaining[0::2], remaining[1::2]
        redundancy = [max(float(similarity[token, odd_token]) for odd_token in odd) for token in even]
        dropped = sorted(range(len(even)), key=lambda index: -redundancy[index])
        remaining = [even[index] for index in dropped[min(8, len(remaining) - diverse) :]] + odd
    return order[:important] + remaining[:diverse]


def plain_determinantal(features: Tensor, relevance: Tensor, number: int) -> list[int]:
    """In each step, add the token that maximizes the determinant of the kernel of the selected tokens."""
    unit = F.normalize(features.double(), dim=-1) * relevance.double()[:, None]
    kernel, picks = unit @ unit.T, list[int]()
    for _ in range(number):
        candidates = [token for token in range(len(features)) if token not in picks]
        picks.append(max(candidates, key=lambda token: float(kernel[[*picks, token]][:, [*picks, token]].det())))
    return picks


@st.composite
def tokens(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Draw features with repeated and zero vectors, token weights with ties and zeros, and a number of picks."""
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
def test_coverage_equals_the_plain_definition(drawn, batch: int, sign: bool) -> None:
    """For all sizes of the first batch, and for negative saliency."""
    features, weights, number = drawn
    saliency, equal = weights - 1 if sign else weights, torch.ones(len(features))
    plain = plain_coverage(pairwise_cosine(features), saliency, equal, number)
    assert lazy_coverage(pairwise_cosine(features), number, saliency=saliency, batch=batch).tolist() == plain
    assert greedy_coverage(pairwise_cosine(features), number, saliency=saliency).tolist() == plain
    assert saliency_coverage(features, saliency, number).tolist() == plain
    plain = plain_coverage(pairwise_cosine(features), equal, weights, number)
    assert lazy_coverage(pairwise_cosine(features), number, weights=weights, batch=batch).tolist() == plain
    assert greedy_coverage(pairwise_cosine(features), number, weights=weights).tolist() == plain
    shifted = (1 + pairwise_cosine(features)) / 2
    assert facility_location(features, weights, number).tolist() == plain_coverage(shifted, equal, weights, number)


@pytest.mark.parametrize("cover", [greedy_coverage, lazy_coverage])
def test_coverage_picks_different_tokens_despite_nan(cover: Callable[..., Tensor]) -> None:
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    features[2] = torch.nan
    picks = cover(pairwise_cosine(features), 5, saliency=torch.rand(8)).tolist()
    assert len(set(picks)) == 5


@settings(deadline=None)
@given(drawn=tokens(), share=st.floats(0, 1))
def test_diverse_picks_equal_the_plain_definitions(drawn, share: float) -> None:
    features, scores, number = drawn
    picks = max_min_diverse(features, number).tolist()
    assert picks == (plain_max_min(features, number) if number else [])
    important = int(share * number)
    kept = important_then_diverse(features, scores, number, important).tolist()
    assert kept == plain_important_then_diverse(features, scores, number, important)


@pytest.mark.parametrize("number", CASES)
def test_lazy_coverage_on_recorded_tiles(number: int) -> None:
    case = Case("scope", number)
    features, saliency, equal = case["features"][0], case["attention"][0].sum(0), torch.ones(576)
    cosine = pairwise_cosine(features)
    assert saliency_coverage(features, saliency, 120).tolist() == plain_coverage(cosine, saliency, equal, 120)
    plain = plain_coverage((1 + cosine) / 2, equal, saliency, 120)
    assert facility_location(features, saliency, 120).tolist() == plain


def test_facility_location_covers_the_largest_weights() -> None:
    features = torch.eye(3)[[0, 0, 0, 1, 1, 2]]
    equal = torch.ones(6)
    assert facility_location(features, equal, 3).tolist() == [0, 3, 5]
    assert facility_location(features, torch.tensor([1.0, 1, 1, 0, 0, 9]), 2).tolist() == [5, 0]
    assert facility_location(features, torch.tensor([-1.0, -1, 1, 0, 0, 9]), 2).tolist() == [5, 0]
    # After all tokens are covered, no token adds coverage, and tokens follow in order of their index.
    assert facility_location(features, equal, 6).tolist() == [0, 3, 5, 1, 2, 4]


class AllocationCounter(TorchDispatchMode):
    """Counts the tensors with at least `size` elements that operators allocate; views are not counted."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        pointers = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        results = [value for value in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(value, Tensor)]
        self.count += sum(
            result.numel() >= self.size and result.untyped_storage().data_ptr() not in pointers for result in results
        )
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
def test_no_step_copies_the_similarities(name: str) -> None:
    """Large tensors are allocated once, before the first pick; their number does not depend on the number of picks."""
    generator = torch.Generator().manual_seed(0)
    features, scores = torch.randn(600, 8, generator=generator), torch.rand(600, generator=generator)
    counts = []
    for number in (20, 100):
        with AllocationCounter(600 * 600 // 5) as counter:
            GREEDY[name](features, scores, number)
        counts.append(counter.count)
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
def test_determinantal_picks_any_number_of_tokens_for_any_rank(drawn) -> None:
    features, relevance, number = drawn
    picks = greedy_dpp(features, relevance, number)
    assert picks.dtype == torch.long
    assert len(set(picks.tolist())) == len(picks) == number
    assert torch.equal(picks, greedy_dpp(features, relevance, number))


def test_determinantal_continues_by_relevance_after_the_features_are_spanned() -> None:
    features = torch.eye(3)[[0, 0, 0, 1, 1, 2]]
    relevance = torch.tensor([0.5, 0.9, 0.7, 0.8, 0.6, 0.4])
    assert greedy_dpp(features, relevance, 6).tolist() == [1, 3, 5, 2, 4, 0]
    assert greedy_dpp(features, torch.ones(6), 6).tolist() == [0, 3, 5, 1, 2, 4]
    assert greedy_dpp(torch.zeros(4, 3), torch.tensor([0.1, 0.4, 0.2, 0.3]), 3).tolist() == [1, 3, 2]
    assert greedy_dpp(torch.ones(4, 3), torch.tensor([0.0, 0.0, 0.0, 1.0]), 2).tolist() == [3, 0]


def test_determinantal_picks_duplicates_last() -> None:
    """Duplicates of the most relevant token are picked last, even if the relevance of the remaining tokens is small."""
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


def test_all_strategies_can_be_measured() -> None:
    threads = torch.get_num_threads()
    costs = measure_strategies(SelectionCostConfig(repeats=2, threads=1), TINY)
    assert [cost.name for cost in costs] == [
        n for n, kind in strategies().items() if kind.stage.name in ("image", "projector")
    ]
    assert all(len(cost.select_ms) == len(cost.encode_ms) == 2 for cost in costs)
    assert all(value > 0 for cost in costs for value in (*cost.select_ms, *cost.encode_ms))
    assert torch.get_num_threads() == threads
    assert len(format_costs(costs).splitlines()) == 4 + len(costs)


def test_targets() -> None:
    fast, slow = Cost("HiRED", (1.9, 9.0, 1.0), (10.0, 90.0, 20.0)), Cost("HiRED", (2.0,), (1000.0,))
    small, large = Cost("SCOPE", (9.0,), (100.0,)), Cost("SCOPE", (10.0,), (100.0,))
    assert [cost.is_met for cost in (fast, slow, small, large)] == [True, False, True, False]
    assert fast.share == 10.0
    assert "| HiRED | 1.90 [1.00, 9.00] | 10.00 | < 2 ms | yes |" in format_costs([fast])
    assert "| SCOPE | 10.00 [10.00, 10.00] | 10.00 | < 10 % | no |" in format_costs([large])
    assert set(strategies()) >= BY_ATTENTION


def test_errors_name_unknown_strategies_and_signals() -> None:
    with pytest.raises(LookupError, match=r"no strategy before the LLM is called 'HiRAD'. Did you mean HiRED"):
        measure_strategies(SelectionCostConfig(["HiRAD"]), TINY)
    with pytest.raises(ValueError, match="cannot build the signal 'echo'"):
        build_random_image(TINY, [Signal("echo", "feature")])
