from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune import ScoreReducer
from tokenprune.catalog import components, strategies
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.strategies.components import (
    BaseTileAllocation,
    GlobalTopAllocation,
    MeanRelevance,
    ProportionalAllocation,
    RandomSelection,
    StrideSelection,
    SubImagesAllocation,
    TopAttentionSelection,
    TopNormSelection,
    TopRelevanceSelection,
    UniformAllocation,
    VisualContentAllocation,
)
from tokenprune.testing.encoded_images import random_encoded_image

SQUARE = TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56)
ALLOCATIONS: list[AllocationPolicy] = [
    VisualContentAllocation(),
    VisualContentAllocation(0.0, region="quadrant"),
    VisualContentAllocation(1.0, layer="feature"),
    VisualContentAllocation(0.3, statistic="top_count"),
    UniformAllocation(),
    ProportionalAllocation(),
    GlobalTopAllocation(),
    SubImagesAllocation(),
    SubImagesAllocation(pooled=True),
    BaseTileAllocation(),
    VisualContentAllocation(rounding="floor"),
    VisualContentAllocation(region="quadrant", rounding="floor", statistic="top_count"),
]


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(ALLOCATIONS),
    size=st.tuples(st.integers(10, 300), st.integers(10, 300)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    total=st.integers(0, 700),
    seed=st.integers(0, 50),
)
def test_allocations_never_exceed_the_capacity(policy, size, grid, total, seed) -> None:
    image = random_encoded_image(TileGeometry.anyres(size, grid, (4, 4), 56), seed)
    valid = image.geometry.valid
    capacity = valid.sum(1).tolist()
    scores = torch.rand(valid.shape).masked_fill(~valid, -torch.inf)
    counts = torch.as_tensor(policy.allocate(image, total, capacity, scores))
    assert (counts.dtype, len(counts)) == (torch.int64, image.geometry.tiles)
    assert all(0 <= count <= limit for count, limit in zip(counts.tolist(), capacity, strict=True))
    limit = capacity[0] if isinstance(policy, BaseTileAllocation) else sum(capacity)
    limit = sum(capacity[1:]) if isinstance(policy, SubImagesAllocation) else limit
    if getattr(policy, "rounding", "") == "floor":
        assert int(counts.sum()) <= min(total, limit)
    else:
        assert int(counts.sum()) == min(total, limit)


def allocate(
    policy: AllocationPolicy, total: int, image: EncodedImage, scores: torch.Tensor | None = None
) -> list[int]:
    """Return the granted tokens of each tile; scores are zero by default."""
    scores = torch.zeros(image.geometry.tiles, image.geometry.tokens) if scores is None else scores
    granted = policy.allocate(image, total, image.geometry.valid_per_tile, scores)
    return torch.as_tensor(granted).tolist()


def test_allocation_examples() -> None:
    image = random_encoded_image(SQUARE)
    padded = random_encoded_image(TileGeometry.anyres((20, 100), (1, 2), (4, 4), 56))  # 16 + 8 + 8 valid tokens
    assert allocate(UniformAllocation(), 20, image) == [4, 4, 4, 4, 4]
    assert allocate(UniformAllocation(), 30, padded) == [14, 8, 8]
    assert allocate(ProportionalAllocation(), 20, padded) == [10, 5, 5]
    assert allocate(BaseTileAllocation(), 20, padded) == [16, 0, 0]
    assert allocate(SubImagesAllocation(), 10, padded) == [0, 5, 5]
    assert allocate(SubImagesAllocation(), 99, padded) == [0, 8, 8]
    single = random_encoded_image(TileGeometry.single((4, 4)))
    with pytest.raises(ValueError, match="needs sub-images"):
        allocate(SubImagesAllocation(), 3, single)
    assert allocate(VisualContentAllocation(0.0), 3, single) == [3]
    assert allocate(VisualContentAllocation(rounding="floor"), 30, single) == [16]


def test_pooled_allocations_count_the_best_tokens() -> None:
    image, scores = random_encoded_image(SQUARE), torch.zeros(5, 16)
    scores[0, :9], scores[2, 3], scores[4, :5] = 5.0, 4.0, 3.0
    assert allocate(GlobalTopAllocation(), 12, image, scores) == [9, 0, 1, 0, 2]
    assert allocate(SubImagesAllocation(pooled=True), 4, image, scores) == [0, 0, 1, 0, 3]


def test_visual_content_reads_the_configured_layers() -> None:
    first, last = torch.zeros(5, 2, 16), torch.zeros(5, 2, 16)
    first[0, :, 0] = 0.25  # top left
    last[0, 0, 15] = 0.25  # bottom right
    signals = {("cls_attention", 0): first, ("cls_attention", 3): last}
    image = EncodedImage(SQUARE, torch.zeros(5, 16, 1), signals, layers=4, feature_layer=2)
    assert allocate(VisualContentAllocation(0.5), 10, image) == [5, 5, 0, 0, 0]
    assert allocate(VisualContentAllocation(0.5, layer=-1), 10, image) == [5, 0, 0, 0, 5]
    assert allocate(VisualContentAllocation(0.5, layer=["first", -1]), 9, image) == [5, 3, 0, 0, 1]
    assert VisualContentAllocation(layer=-1).content(image).tolist() == [0, 0, 0, 0.25]
    assert VisualContentAllocation().content(image).tolist() == [0.5, 0, 0, 0]  # heads are summed


def test_visual_content_reads_the_base_tile_only() -> None:
    attention = torch.rand(5, 2, 16)
    changed_attention = attention.clone()
    changed_attention[1:] = torch.rand(4, 2, 16)
    images = [
        EncodedImage(SQUARE, torch.zeros(5, 16, 1), {("cls_attention", 0): signal}, layers=4)
        for signal in (attention, changed_attention)
    ]
    assert allocate(VisualContentAllocation(), 40, images[0]) == allocate(VisualContentAllocation(), 40, images[1])


def test_without_attention_sub_images_get_equal_budgets() -> None:
    signals = {("cls_attention", 0): torch.zeros(5, 2, 16)}
    image = EncodedImage(SQUARE, torch.zeros(5, 16, 1), signals, layers=4)
    assert allocate(VisualContentAllocation(0.5), 40, image) == [16, 6, 6, 6, 6]
    assert allocate(VisualContentAllocation(0.5, rounding="floor"), 20, image) == [10, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"base_share": 1.1},
        {"base_share": -0.1},
        {"base_share": float("nan")},
        {"region": "row"},
        {"statistic": "sum"},
        {"rounding": "up"},
    ],
)
def test_visual_content_refuses_invalid_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VisualContentAllocation(**options)  # type: ignore[arg-type]


def test_top_attention_combines_heads() -> None:
    image = random_encoded_image(SQUARE)
    attention = image.signals["cls_attention", 2]
    assert torch.equal(TopAttentionSelection().score(image), attention.sum(1))
    assert torch.equal(TopAttentionSelection(heads="max").score(image), attention.max(1).values)
    assert torch.equal(TopAttentionSelection(heads=1).score(image), attention[:, 1])
    assert torch.equal(
        TopAttentionSelection(heads=-1, layer="first").score(image), image.signals["cls_attention", 0][:, 2]
    )
    with pytest.raises(ValueError, match="heads=3 is no head of a vision tower with 3 heads"):
        TopAttentionSelection(heads=3).score(image)
    for heads in ("mean", True, 0.5):
        with pytest.raises(ValueError, match="is not known; use 'sum', 'max'"):
            TopAttentionSelection(heads=heads)  # type: ignore[arg-type]


@settings(deadline=None)
@given(data=st.data(), tokens=st.integers(1, 40))
def test_uniform_stride_is_even(data, tokens: int) -> None:
    """Gaps between kept candidates differ by at most one."""
    geometry = TileGeometry.single((1, tokens))
    candidates = torch.tensor([data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))])
    budget = data.draw(st.integers(0, int(candidates.sum())))
    image = random_encoded_image(geometry)
    kept = StrideSelection().pick(image, torch.zeros(1, tokens), torch.tensor([budget]), candidates)
    assert int(kept.sum()) == budget
    assert not bool((kept & ~candidates).any())
    positions = kept[candidates].nonzero().flatten()
    gaps = positions.diff().tolist()
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_uniform_stride_starts_after_half_a_step() -> None:
    def kept_positions(budget: int, candidates: list[int]) -> list[int]:
        mask = torch.zeros(1, 10, dtype=torch.bool)
        mask[0, candidates] = True
        image = random_encoded_image(TileGeometry.single((2, 5)))
        kept = StrideSelection().pick(image, torch.zeros(1, 10), torch.tensor([budget]), mask)
        return kept[0].nonzero().flatten().tolist()

    assert kept_positions(1, list(range(10))) == [5]
    assert kept_positions(2, list(range(8))) == [2, 6]
    assert kept_positions(5, list(range(10))) == [1, 3, 5, 7, 9]
    assert kept_positions(2, [0, 3, 4, 9]) == [3, 9]
    assert kept_positions(0, [0, 3]) == []


def test_random_selection_depends_only_on_the_seed_and_the_layout() -> None:
    image, changed_image = random_encoded_image(SQUARE, 1), random_encoded_image(SQUARE, 2)
    assert torch.equal(RandomSelection(3).score(image), RandomSelection(3).score(changed_image))
    assert not torch.equal(RandomSelection(3).score(image), RandomSelection(4).score(image))
    state = torch.random.get_rng_state()
    RandomSelection(3).score(image)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global random state does not change


def test_top_norm() -> None:
    image = random_encoded_image(SQUARE)
    expected = image.features.double().square().sum(-1).sqrt().float()
    torch.testing.assert_close(TopNormSelection().score(image), expected)


def test_mean_relevance_is_the_cosine_to_the_mean_of_the_valid_tokens() -> None:
    image = random_encoded_image(TileGeometry.anyres((60, 100), (2, 2), (4, 4), 56))
    valid, features = image.geometry.valid, image.features.double()
    assert not bool(valid.all())
    for tile, relevance in enumerate(MeanRelevance(sign="aligned").relevance(image)):
        mean = features[tile][valid[tile]].mean(dim=0)
        cosine = features[tile] @ mean / features[tile].norm(dim=-1).clamp(min=1e-8) / mean.norm()
        torch.testing.assert_close(relevance, cosine.float())
    mean = features[valid].mean(dim=0)
    cosine = features @ mean / features.norm(dim=-1).clamp(min=1e-8) / mean.norm()
    torch.testing.assert_close(MeanRelevance("image").relevance(image), -cosine.float())
    assert TopRelevanceSelection(MeanRelevance()).needs == ()
    with pytest.raises(ValueError, match="over='all' is not known"):
        MeanRelevance("all")  # type: ignore[arg-type]


def test_components_without_signals_need_no_signals() -> None:
    for component in (
        UniformAllocation(),
        ProportionalAllocation(),
        TopNormSelection(),
        RandomSelection(),
        StrideSelection(),
    ):
        assert component.needs == ()
    with pytest.raises(TypeError, match="abstract"):
        SelectionPolicy()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="abstract"):
        AllocationPolicy()  # type: ignore[abstract]


CLASSES = {**components(), **strategies()}
OPTIONS = [
    (name, option)
    for name, kind in CLASSES.items()
    for option, hint in get_type_hints(kind).items()
    if get_origin(hint) is Literal
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_unknown_option_is_refused(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}='nonsense' is not known; use one of '"):
        CLASSES[name](**{option: "nonsense"})  # type: ignore[call-arg]


def test_an_annotation_for_type_checkers_only_is_no_option() -> None:
    @dataclass
    class Strategy(ScoreReducer):
        table: NotImported = None  # type: ignore[name-defined]  # noqa: F821
        mode: Literal["a", "b"] = "a"

        def score(self, image: EncodedImage) -> Tensor:
            return image.features.float().norm(dim=-1)

    assert Strategy(mode="b").mode == "b"
    with pytest.raises(ValueError, match="mode='c' is not known; use one of 'a', 'b'"):
        Strategy(mode="c")  # type: ignore[arg-type]
