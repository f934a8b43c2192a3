from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenprune.budget import Budget, OneTokenWarning, apportion, as_budget, normalize_budget, parse_ratio
from tokenprune.configuration import as_config
from tokenprune.geometry import TileGeometry
from tokenprune.strategies import HERO, GlobalCom2, HiRED

PARTS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 50), st.floats(0, 1e6, allow_nan=False), st.floats(0, 1e-6)), st.integers(0, 40)
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(parts=PARTS, total=st.integers(0, 400))
def test_apportion_distributes_the_total_up_to_the_capacity(parts: list[tuple[float, int]], total: int) -> None:
    weights, capacity = [weight for weight, _ in parts], [limit for _, limit in parts]
    shares = apportion(total, weights, capacity)
    assert sum(shares) == min(total, sum(capacity))
    assert all(0 <= share <= limit for share, limit in zip(shares, capacity, strict=True))
    assert all(type(share) is int for share in shares)


@settings(deadline=None)
@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=9), total=st.integers(0, 5000))
def test_apportion_rounds_quotas_by_largest_remainder(weights: list[int], total: int) -> None:
    shares = apportion(total, weights, [total + 1] * len(weights))
    quotas = [Fraction(total * weight, sum(weights)) for weight in weights]
    surplus = [share - math.floor(quota) for share, quota in zip(shares, quotas, strict=True)]
    assert set(surplus) <= {0, 1}
    remainders = [quota - math.floor(quota) for quota in quotas]
    rounded_up = [remainder for remainder, unit in zip(remainders, surplus, strict=True) if unit]
    rounded_down = [remainder for remainder, unit in zip(remainders, surplus, strict=True) if not unit]
    assert not rounded_up or not rounded_down or min(rounded_up) >= max(rounded_down)


@settings(deadline=None)
@given(rng=st.randoms(use_true_random=False), number=st.integers(1, 7), total=st.integers(0, 120))
def test_apportion_does_not_depend_on_the_order_of_the_parts(rng, number: int, total: int) -> None:
    weights = [rng.uniform(0.1, 1.0) for _ in range(number)]
    capacity = [rng.randrange(30) for _ in range(number)]
    assume(len(set(weights)) == number)
    order = list(range(number))
    rng.shuffle(order)
    shares = apportion(total, weights, capacity)
    permuted = apportion(total, [weights[i] for i in order], [capacity[i] for i in order])
    assert permuted == [shares[i] for i in order]


@settings(deadline=None)
@given(parts=PARTS, total=st.integers(0, 400))
def test_parts_of_weight_zero_receive_only_the_overflow(parts: list[tuple[float, int]], total: int) -> None:
    weights, capacity = [weight for weight, _ in parts], [limit for _, limit in parts]
    shares = apportion(total, weights, capacity)
    if any(share for share, weight in zip(shares, weights, strict=True) if weight == 0):
        assert all(share == limit for share, limit, weight in zip(shares, capacity, weights, strict=True) if weight > 0)


@settings(deadline=None)
@given(parts=PARTS, total=st.integers(0, 400))
def test_overflow_is_shared_in_proportion_to_the_weights(parts: list[tuple[float, int]], total: int) -> None:
    """Parts below their capacity share the remaining total in proportion to their weights."""
    weights = [Fraction(weight) for weight, _ in parts]
    capacity = [limit for _, limit in parts]
    shares = apportion(total, [weight for weight, _ in parts], capacity)
    open_parts = [i for i in range(len(parts)) if shares[i] < capacity[i] and weights[i] > 0]
    if not open_parts:
        return
    remaining, weight_sum = sum(shares[i] for i in open_parts), sum(weights[i] for i in open_parts)
    # rounding may fill a part exactly to its capacity: allow one unit for each full part
    slack = 1 + sum(1 for i in range(len(parts)) if shares[i] == capacity[i])
    assert all(abs(shares[i] - remaining * weights[i] / weight_sum) <= slack for i in open_parts)


@pytest.mark.parametrize(
    ("total", "weights", "capacity", "expected"),
    [
        (10, [1, 1, 1], [10, 10, 10], [4, 3, 3]),  # tie to the lower index
        (10, [1, 1], [2, 100], [2, 8]),  # overflow
        (10, [3, 1, 1], [2, 100, 100], [2, 4, 4]),
        (7, [0, 1], [5, 4], [3, 4]),  # weight zero only if the other part is full
        (6, [0, 0], [4, 8], [2, 4]),  # all weights zero: in proportion to the capacity
        (5, [0.29, 0.71], [100, 100], [1, 4]),
        (100, [1, 2], [3, 4], [3, 4]),  # more than the capacity
        (0, [1, 2], [3, 4], [0, 0]),
        (3, [], [], []),
        (1, [1e-300, 1e300], [5, 5], [0, 1]),
        (6, [1e-300, 1e300], [5, 5], [1, 5]),
    ],
)
def test_apportion_examples(total: int, weights: list[float], capacity: list[int], expected: list[int]) -> None:
    assert apportion(total, weights, capacity) == expected


@pytest.mark.parametrize(
    ("total", "weights", "capacity", "message"),
    [
        (1, [1.0], [1, 2], "1 weights but 2 capacities"),
        (-1, [1.0], [1], "must be finite and >= 0"),
        (1, [-1.0], [1], "must be finite and >= 0"),
        (1, [1.0], [-1], "must be finite and >= 0"),
        (1, [math.nan], [1], "must be finite and >= 0"),
        (1, [math.inf], [1], "must be finite and >= 0"),
    ],
)
def test_apportion_refuses_invalid_arguments(
    total: int, weights: list[float], capacity: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apportion(total, weights, capacity)


SQUARE = TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56)  # 5 x 16 = 80 tokens, all valid, 8 newlines
WIDE = TileGeometry.anyres((40, 100), (1, 2), (4, 4), 56)  # 3 x 16 tokens; 40/100 * 8 = 3 rows, 1 row of padding


def test_token_counts_of_the_layouts() -> None:
    assert (SQUARE.tiles, int(SQUARE.valid.sum()), SQUARE.newlines) == (5, 80, 8)
    assert (WIDE.tiles, int(WIDE.valid.sum()), WIDE.newlines) == (3, 48, 4)


@pytest.mark.parametrize(
    ("budget", "asked"),
    [
        (Budget(0.2), 16),
        (Budget(1.0), 80),
        (Budget(0.0), 0),
        (Budget(0), 0),
        (Budget(1), 1),
        (Budget(160), 160),
        (Budget(7, per="tile"), 35),
        (Budget(0.5, per="tile"), 40),
        (Budget(0.1, per="tile"), 5),  # int(0.1 * 16) is one token in each tile
        (Budget(0.1), 8),  # 8 of all 80 tokens
        (Budget(0.5, newlines="counted"), 44),
        (Budget(1.0, newlines="counted"), 88),
        (Budget(0.1, per="tile", newlines="counted"), 5),  # int(0.1 * 8) is no newline
        (Budget(50, newlines="counted"), 50),
    ],
)
def test_asked_tokens(budget: Budget, asked: int) -> None:
    assert budget.asked(SQUARE) == asked


def test_a_ratio_of_unpadded_tokens_excludes_padding() -> None:
    layout = TileGeometry.anyres((20, 100), (1, 2), (4, 4), 56)  # two of four canvas rows are image: 16 + 16 tokens
    assert int(layout.valid.sum()) == 32
    assert layout.newlines == 2
    assert Budget(0.5).asked(layout) == 24
    assert Budget(0.5, of="unpadded").asked(layout) == 16
    assert Budget(0.5, of="unpadded", newlines="counted").asked(layout) == 17
    assert Budget(0.3, of="unpadded", per="tile").asked(layout) == int(0.3 * 16) + 2 * int(0.3 * 8)


@settings(deadline=None)
@given(percent=st.integers(0, 100), hundreds=st.integers(1, 40))
def test_ratios_are_exact_decimals(percent: int, hundreds: int) -> None:
    """`int(100 * 0.29)` is 28; a budget of 29 % of 100 tokens is 29."""
    layout = TileGeometry((0, 0), (10, 10 * hundreds), torch.zeros(0, 4), torch.arange(100 * hundreds))
    assert Budget(percent / 100).asked(layout) == percent * hundreds


def row_layout(tokens: int) -> TileGeometry:
    return TileGeometry((0, 0), (1, tokens), torch.zeros(0, 4), torch.arange(tokens))


@settings(deadline=None)
@given(fraction=st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_ratio_of_counts_grants_the_counted_tokens(fraction: tuple[int, int]) -> None:
    kept, tokens = fraction
    assert Budget(kept / tokens).asked(row_layout(tokens)) == kept
    assert Budget(1 - kept / tokens).asked(row_layout(tokens)) == tokens - kept
    assert Budget(np.float32(kept / tokens)).asked(row_layout(tokens)) in (kept, kept - 1)
    assert Budget(Fraction(kept, tokens)).asked(row_layout(tokens)) == kept  # type: ignore[arg-type]


def test_ratios_with_rounding_errors() -> None:
    assert Budget(1 - 0.9).asked(row_layout(500)) == 50
    assert Budget(1 - 0.8).asked(row_layout(500)) == 100
    assert Budget(0.1 * 3).asked(row_layout(10)) == 3
    assert Budget(157 / 2880).asked(row_layout(2880)) == 157
    assert Budget(np.float32(0.1)).asked(row_layout(500)) == 50  # type: ignore[arg-type]
    assert Budget(0.0999).asked(row_layout(500)) == 49


@settings(deadline=None)
@given(number=st.one_of(st.integers(0, 100), st.decimals(0, 100, places=3)), spaces=st.sampled_from(["", " "]))
def test_a_percentage_is_the_ratio(number: Any, spaces: str) -> None:
    text = f"{spaces}{number}{spaces}%"
    ratio = float(Fraction(number) / 100)
    assert as_budget(text) == Budget(ratio)
    assert parse_ratio(text) == normalize_budget(text) == ratio


@pytest.mark.parametrize(
    ("amount", "stored"),
    [
        ("20%", 0.2),
        ("100%", 1.0),
        ("0%", 0.0),
        ("12.5 %", 0.125),
        (np.int64(60), 60),
        (np.uint8(3), 3),
        (np.float64(0.2), 0.2),
        (np.float32(0.5), 0.5),
        (Fraction(1, 5), 0.2),
        (0.2, 0.2),
        (160, 160),
    ],
)
def test_a_reducer_stores_plain_numbers(amount: Any, stored: int | float) -> None:
    reducer = HiRED(amount)
    assert (reducer.budget, type(reducer.budget)) == (stored, type(stored))
    assert reducer == HiRED(stored)
    nested = HiRED(Budget(amount, per="tile"))
    assert nested.budget == Budget(stored, per="tile")
    config = as_config(nested)["init_args"]["budget"]
    assert (config["amount"], type(config["amount"])) == (stored, type(stored))
    assert Budget(amount).asked(row_layout(1000)) == Budget(stored).asked(row_layout(1000))


@pytest.mark.parametrize("retention", ["50%", np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_presets_of_a_ratio_store_plain_numbers(retention: Any) -> None:
    for reducer, expected in (
        (GlobalCom2.release(retention), GlobalCom2.release(0.5)),
        (HERO.release(retention), HERO.release(0.5)),
    ):
        assert as_config(reducer) == as_config(expected)
        stored = as_config(reducer)["init_args"]["allocation"]["init_args"]["retention"]
        assert (stored, type(stored)) == (0.5, float)


def test_counts_are_not_ratios() -> None:
    assert parse_ratio(1) == 1.0
    for amount in (2, 1.5, "120%", "abc", -1):
        with pytest.raises(ValueError, match="neither a ratio nor a count"):
            parse_ratio(amount)


@pytest.mark.parametrize(("budget", "unit"), [(1, "image"), (np.int64(1), "image"), (Budget(1, per="tile"), "tile")])
def test_a_budget_of_one_token_warns(budget: Any, unit: str) -> None:
    message = rf"one token per {unit}; .* write 1\.0 or '100%' \(in sweeps only '100%'"
    with pytest.warns(OneTokenWarning, match=message):
        HiRED(budget)


@pytest.mark.parametrize("budget", [1.0, "100%", 0, 2, 0.2, Budget(1.0), Budget("100%")])
def test_other_budgets_do_not_warn(budget: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HiRED(budget)


UNSUPPORTED_NUMBERS = [np.bool_(True), np.array(0.2), torch.tensor(0.2), torch.tensor(3), np.float64("nan"), 1j]


@pytest.mark.parametrize("amount", UNSUPPORTED_NUMBERS, ids=repr)
def test_unsupported_number_types_are_refused(amount: Any) -> None:
    with pytest.raises(ValueError, match=r"neither a ratio nor a count.*take \.item\(\) of a tensor"):
        HiRED(amount)


@pytest.mark.parametrize(
    "amount", [1.5, -1, -0.1, True, False, math.nan, math.inf, "0.2", None, [1], "", "%", "-5%", "101%", "abc", "1e1%"]
)
def test_invalid_amounts_are_refused(amount: object) -> None:
    with pytest.raises(ValueError, match="neither a ratio nor a count"):
        Budget(amount)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither a ratio nor a count"):
        as_budget(amount)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["per", "of", "newlines"])
def test_the_error_for_an_unknown_option_lists_the_options(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}='row' is not known; use one of"):
        Budget(0.2, **{option: "row"})  # type: ignore[arg-type]


def test_as_budget() -> None:
    budget = Budget(3, per="tile")
    assert as_budget(budget) is budget
    assert as_budget(0.4) == Budget(0.4)
    assert as_budget(4) == Budget(4)
