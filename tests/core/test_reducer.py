"""Test properties of every strategy: exact budgets, only valid tokens, deterministic results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.policies import SelectionPolicy
from tokenprune.reducer import ScoreReducer, TokenReducer
from tokenprune.selection import Selection, kept_newlines
from tokenprune.strategies import HiRED
from tokenprune.strategies.components import (
    BaseTileAllocation,
    GlobalTopAllocation,
    ProportionalAllocation,
    RandomSelection,
    StrideSelection,
    SubImagesAllocation,
    TopAttentionSelection,
    TopNormSelection,
    UniformAllocation,
    VisualContentAllocation,
)
from tokenprune.testing.encoded_images import random_encoded_image


@dataclass
class NormReducer(ScoreReducer):
    """Scores tokens by the norm of their features, as the example of a new strategy in the README does."""

    def score(self, image: EncodedImage) -> Tensor:
        return image.features.norm(dim=-1)


@dataclass
class ComponentsReducer(ComponentReducer):
    """Combines any allocation with any selection."""


EXACT_ALLOCATIONS = [
    VisualContentAllocation(),
    VisualContentAllocation(0.0, region="quadrant"),
    VisualContentAllocation(1.0, statistic="top_count"),
    UniformAllocation(),
    ProportionalAllocation(),
    GlobalTopAllocation(),
]
SELECTIONS = [
    TopAttentionSelection(),
    TopAttentionSelection(heads="max", layer=-1),
    TopNormSelection(),
    RandomSelection(1),
    StrideSelection(),
]
REDUCERS: list[TokenReducer] = [
    NormReducer(),
    HiRED(),
    *(
        ComponentsReducer(allocation=allocation, selection=selection)
        for allocation, selection in product(EXACT_ALLOCATIONS, SELECTIONS)
    ),
]
LAYOUTS = st.one_of(
    st.builds(
        TileGeometry.anyres,
        st.tuples(st.integers(1, 300), st.integers(1, 300)),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.just(56),
    ),
    st.builds(TileGeometry.single, st.tuples(st.integers(1, 6), st.integers(1, 6))),
)
BUDGETS = st.one_of(
    st.sampled_from([0, 1, 2, 0.0, 1.0, 10_000]), st.integers(0, 300), st.floats(0, 1, allow_nan=False, width=16)
)
PROPERTY_SETTINGS = settings(max_examples=150, deadline=None)


@PROPERTY_SETTINGS
@given(
    reducer=st.sampled_from(REDUCERS),
    layout=LAYOUTS,
    budget=BUDGETS,
    per=st.sampled_from(["image", "tile"]),
    of=st.sampled_from(["encoded", "unpadded"]),
    newlines=st.sampled_from(["keep_rows", "drop", "keep"]),
    seed=st.integers(0, 20),
)
def test_the_budget_is_spent_exactly_on_valid_tokens(reducer, layout, budget, per, of, newlines, seed) -> None:
    reducer = replace(reducer, budget=Budget(budget, per=per, of=of), newlines=newlines)
    image = random_encoded_image(layout, seed)
    selection = reducer.reduce(image)
    assert selection.asked == reducer.budget.asked(layout)
    assert selection.kept_tokens == min(selection.asked, int(layout.valid.sum()))
    assert not bool((selection.kept & ~layout.valid).any())
    assert selection.kept_per_tile == selection.granted_per_tile
    assert sum(selection.granted_per_tile) == selection.kept_tokens
    assert int(selection.packed_mask().sum()) == selection.kept_tokens + selection.kept_newlines
    repeated = reducer.reduce(random_encoded_image(layout, seed))
    assert torch.equal(repeated.kept, selection.kept)
    assert torch.equal(repeated.newline_mask, selection.newline_mask)
    if budget == 1.0 and type(budget) is float and of == "encoded" and newlines != "drop":
        assert selection.is_identity


@PROPERTY_SETTINGS
@given(
    reducer=st.sampled_from(REDUCERS),
    layout=LAYOUTS,
    budget=BUDGETS,
    newlines=st.sampled_from(["keep_rows", "drop", "keep"]),
    seed=st.integers(0, 20),
)
def test_counted_newlines_share_the_budget_exactly(reducer, layout, budget, newlines, seed) -> None:
    reducer = replace(reducer, budget=Budget(budget, newlines="counted"), newlines=newlines)
    selection = reducer.reduce(random_encoded_image(layout, seed))
    spent = selection.kept_tokens + selection.kept_newlines
    available = int(layout.valid.sum()) + (0 if newlines == "drop" else layout.newlines)
    assert spent == min(selection.asked, available)
    assert not bool((selection.kept & ~layout.valid).any())
    assert selection.kept_per_tile == selection.granted_per_tile
    if newlines == "keep_rows":
        closing = kept_newlines(layout, selection.kept, "keep_rows")
        assert bool((selection.newline_mask | ~closing).all())  # every row with a kept token keeps its newline token


@pytest.mark.parametrize(
    "reducer",
    [
        HiRED(),
        NormReducer(),
        ComponentsReducer(allocation=SubImagesAllocation(), selection=StrideSelection()),
        ComponentsReducer(allocation=VisualContentAllocation(0.0), selection=TopAttentionSelection()),
    ],
    ids=["hired", "norm", "stride", "no base tile"],
)
@pytest.mark.parametrize("size", [(60, 160), (100, 41)])
def test_counted_newlines_leave_room_for_as_many_tokens_as_fit(reducer, size) -> None:
    """For every budget, the token count is the largest that fits; the remaining budget keeps newlines of empty rows."""
    layout = TileGeometry.anyres(size, (2, 2), (4, 4), 56)
    image = random_encoded_image(layout, 1)
    costs = []
    for tokens in range(int(layout.valid.sum()) + 1):
        uncounted = replace(reducer, budget=tokens).reduce(image)
        costs.append((uncounted.kept_tokens + uncounted.kept_newlines, uncounted.kept_tokens))
    spare_count = 0
    for asked in range(costs[-1][0] + 3):
        selection = replace(reducer, budget=Budget(asked, newlines="counted")).reduce(image)
        assert selection.kept_tokens == max(tokens for cost, tokens in costs if cost <= asked)
        closing = int(kept_newlines(layout, selection.kept, "keep_rows").sum())
        spare = min(asked - selection.kept_tokens - closing, layout.newlines - closing)
        assert selection.kept_newlines == closing + spare
        spare_count += spare > 0
    assert spare_count > 0


@settings(max_examples=60, deadline=None)
@given(
    allocation=st.sampled_from(
        [
            BaseTileAllocation(),
            VisualContentAllocation(rounding="floor"),
            SubImagesAllocation(),
            SubImagesAllocation(pooled=True),
        ]
    ),
    selection=st.sampled_from(SELECTIONS),
    padding=st.sampled_from(["exclude", "ignore"]),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    budget=BUDGETS,
    newlines=st.sampled_from(["free", "counted"]),
)
def test_strategies_that_waste_budget_never_overspend(
    allocation, selection, padding, size, grid, budget, newlines
) -> None:
    layout = TileGeometry.anyres(size, grid, (4, 4), 56)
    reducer = ComponentsReducer(
        Budget(budget, newlines=newlines), allocation=allocation, selection=selection, padding=padding
    )
    result = reducer.reduce(random_encoded_image(layout))
    cost = result.kept_tokens + (result.kept_newlines if newlines == "counted" else 0)
    assert cost <= result.asked
    assert not bool((result.kept & ~layout.valid).any())
    if padding == "exclude":
        assert result.kept_per_tile == result.granted_per_tile
    else:
        assert all(kept <= granted for kept, granted in zip(result.kept_per_tile, result.granted_per_tile, strict=True))


def test_ignoring_padding_loses_the_padding_tokens() -> None:
    layout = TileGeometry.anyres((20, 100), (1, 2), (4, 4), 56)  # half of the canvas is padding
    components = {"allocation": UniformAllocation(), "selection": RandomSelection(0)}
    selection = ComponentsReducer(0.5, padding="ignore", **components).reduce(random_encoded_image(layout))
    assert selection.granted_per_tile == [8, 8, 8]
    assert selection.kept_tokens < 24 == selection.asked
    assert ComponentsReducer(0.5, **components).reduce(random_encoded_image(layout)).kept_tokens == 24


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["norm", "attention", "uniform"]),
    layout=LAYOUTS,
    budget=BUDGETS,
    rng=st.randoms(use_true_random=False),
)
def test_permuting_tokens_permutes_the_selection(name, layout, budget, rng) -> None:
    """Shuffling the tokens inside the tiles shuffles the mask, because selection reads values and not positions."""
    order = list(range(layout.tokens))
    rng.shuffle(order)
    permutation = torch.tensor(order)
    inverse = permutation.argsort()
    flat_indices = layout.packed.clamp(min=0)
    permuted_packed = torch.where(
        layout.packed == NEWLINE,
        NEWLINE,
        flat_indices // layout.tokens * layout.tokens + inverse[flat_indices % layout.tokens],
    )
    permuted_layout = replace(layout, packed=permuted_packed)
    image = random_encoded_image(layout, rng.randrange(100))
    permuted = EncodedImage(
        permuted_layout,
        image.features[:, permutation],
        {key: value[:, :, permutation] for key, value in image.signals.items() if key[0] == "cls_attention"},
        layers=image.layers,
        feature_layer=image.feature_layer,
    )
    reducer: TokenReducer = {
        "norm": NormReducer(budget),
        "attention": ComponentsReducer(budget, allocation=GlobalTopAllocation(), selection=TopAttentionSelection()),
        "uniform": ComponentsReducer(budget, allocation=UniformAllocation(), selection=TopAttentionSelection()),
    }[name]
    kept = reducer.reduce(image).kept
    assert torch.equal(reducer.reduce(permuted).kept, kept[:, permutation])


def test_a_score_reducer_keeps_the_best_tokens_of_the_image() -> None:
    layout = TileGeometry.anyres((20, 100), (1, 2), (4, 4), 56)
    image = random_encoded_image(layout)
    selection = NormReducer(7).reduce(image)
    scores = image.features.norm(dim=-1)[layout.valid]
    assert float(image.features.norm(dim=-1)[selection.kept].min()) == float(scores.sort().values[-7])
    assert bool((selection.scores[~layout.valid] == -torch.inf).all())


@dataclass
class FixedReducer(TokenReducer):
    """Returns a given mask."""

    mask: object = None

    def select(self, image: EncodedImage) -> Selection:
        return Selection(image.geometry, self.mask, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 16), "must return a bool mask"),
        (torch.ones(3, 15, dtype=torch.bool), r"bool mask `kept` \[tiles, tokens\] = \[3, 16\]"),
        (torch.ones(48, dtype=torch.bool), r"not torch.bool \[48\]"),
        (torch.ones(3, 16, dtype=torch.bool), "kept tokens that the model's own unpadding removes"),
    ],
)
def test_invalid_selections_raise(mask: Tensor, message: str) -> None:
    image = random_encoded_image(TileGeometry.anyres((20, 100), (1, 2), (4, 4), 56))
    with pytest.raises(ValueError, match=message):
        FixedReducer(mask=mask).reduce(image)


def test_reduce_adds_missing_newlines_and_pixels() -> None:
    layout = TileGeometry.anyres((10, 20), (1, 2), (2, 2), 10)
    kept = torch.zeros(3, 4, dtype=torch.bool)
    kept[2, 3] = True
    image = replace(random_encoded_image(layout), pixels=torch.zeros(3, 8, 8, 3, dtype=torch.uint8))
    selection = FixedReducer(mask=kept).reduce(image)
    assert selection.newline_mask.tolist() == [False, True]
    assert selection.pixels is image.pixels
    assert FixedReducer(mask=kept, newlines="drop").reduce(image).kept_newlines == 0
    assert FixedReducer(mask=kept, newlines="keep").reduce(image).kept_newlines == 2

    @dataclass
    class FixedNewlinesReducer(FixedReducer):
        def select(self, image: EncodedImage) -> Selection:
            return replace(super().select(image), newline_mask=torch.tensor([True, False]))

    assert FixedNewlinesReducer(mask=kept).reduce(image).newline_mask.tolist() == [True, False]


@dataclass
class FixedScoreSelection(SelectionPolicy):
    """Returns given scores."""

    values: object = None

    def score(self, image: EncodedImage) -> Tensor:
        return self.values  # type: ignore[return-value]


def test_invalid_scores_raise_and_extreme_scores_do_not() -> None:
    layout = TileGeometry.anyres((20, 100), (1, 2), (4, 4), 56)
    image = random_encoded_image(layout)

    def reduce(values: Tensor) -> Selection:
        return ComponentsReducer(9, allocation=UniformAllocation(), selection=FixedScoreSelection(values)).reduce(image)

    with pytest.raises(
        ValueError,
        match=r"FixedScoreSelection.score must return a tensor \[tiles, tokens\] = \[3, 16\], not torch.float32 \[48\]",
    ):
        reduce(torch.zeros(48))
    nan = torch.zeros(3, 16)
    nan[0, 0] = torch.nan
    with pytest.raises(ValueError, match="returned NaN"):
        reduce(nan)
    padding_nan = torch.zeros(3, 16).masked_fill(~layout.valid, torch.nan)
    assert reduce(padding_nan).kept_tokens == 9  # scores of padding are not read
    for values in (torch.full((3, 16), -torch.inf), torch.full((3, 16), torch.inf), torch.arange(48).view(3, 16)):
        assert reduce(values).kept_tokens == 9
    assert reduce(torch.arange(48).view(3, 16).bfloat16()).kept_tokens == 9


def test_scores_of_minus_infinity_are_valid_for_every_allocation() -> None:
    @dataclass
    class InfiniteScoreReducer(ScoreReducer):
        def score(self, image: EncodedImage) -> Tensor:
            return torch.full((3, 16), -torch.inf)

    @dataclass
    class InfiniteScoreSelection(SelectionPolicy):
        def score(self, image: EncodedImage) -> Tensor:
            return torch.full(image.features.shape[:2], -torch.inf)

    image = random_encoded_image(TileGeometry.anyres((20, 100), (1, 2), (4, 4), 56))
    assert InfiniteScoreReducer(9).reduce(image).kept_tokens == 9
    for allocation in (GlobalTopAllocation(), SubImagesAllocation(pooled=True), UniformAllocation()):
        assert (
            ComponentsReducer(9, allocation=allocation, selection=InfiniteScoreSelection()).reduce(image).kept_tokens
            == 9
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.5}, "neither a ratio nor a count"),
        ({"positions": "renumber"}, "positions='renumber' is not known; use one of 'reindex', 'preserve'"),
        ({"newlines": "rows"}, "newlines='rows' is not known"),
        ({"padding": "pay"}, "padding='pay' is not known"),
        ({"allocation": TopNormSelection()}, "is no AllocationPolicy"),
        ({"allocation": UniformAllocation}, "is no AllocationPolicy"),
        ({"selection": "top-norm"}, "is no SelectionPolicy"),
    ],
)
def test_options_are_validated_in_the_constructor(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiRED(**options)  # type: ignore[arg-type]


def test_reduce_mutates_no_input() -> None:
    image = random_encoded_image(TileGeometry.anyres((100, 41), (2, 1), (4, 4), 56))
    signals = {key: value.clone() for key, value in image.signals.items()}
    features, packed = image.features.clone(), image.geometry.packed.clone()
    reducer = HiRED(Budget(0.4, newlines="counted"))
    initial_repr = repr(reducer)
    reducer.reduce(image)
    assert all(torch.equal(image.signals[key], value) for key, value in signals.items())
    assert torch.equal(image.features, features)
    assert torch.equal(image.geometry.packed, packed)
    assert repr(reducer) == initial_repr


@pytest.mark.parametrize("value", [None, [1.0], 3.0])
def test_scores_and_selections_of_another_type_raise(value: object) -> None:
    @dataclass
    class WrongScore(ScoreReducer):
        def score(self, image: EncodedImage) -> Tensor:
            return value  # type: ignore[return-value]

    @dataclass
    class WrongSelection(TokenReducer):
        def select(self, image: EncodedImage) -> Selection:
            return value  # type: ignore[return-value]

    image = random_encoded_image(TileGeometry.single((4, 4)))
    with pytest.raises(TypeError, match=r"WrongScore.score must return a tensor \[tiles, tokens\] = \[1, 16\], not"):
        WrongScore(0.5).reduce(image)
    with pytest.raises(TypeError, match=f"WrongSelection.select must return a Selection, not {type(value).__name__}"):
        WrongSelection(0.5).reduce(image)
