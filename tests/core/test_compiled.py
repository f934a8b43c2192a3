"""What torch.compile and CUDA graphs can take as one piece, and models whose parts are compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenprune.budget import Budget, apportion, apportion_tensor
from tokenprune.image import EncodedImage, TileGeometry
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies import VTCCLS, BaseTileOnly, FasterVLM, HiRED, VisPruner
from tokenprune.strategies.components.allocation import (
    GlobalTopAllocation,
    ProportionalAllocation,
    ScoreMassAllocation,
    VisualContentAllocation,
)
from tokenprune.strategies.components.selection import TopAttentionSelection
from tokenprune.testing.tiny_models import batch, tiny_model

SQUARE = TileGeometry.anyres((672, 672), (2, 2), (24, 24), 336)
PADDED = TileGeometry.anyres((300, 900), (1, 3), (24, 24), 336)
ONE = TileGeometry.single((24, 24))
ATTENTION = [
    HiRED(0.2),
    HiRED(0.05),
    HiRED(0.2, allocation=VisualContentAllocation(statistic="top_count", region="stripe")),
    HiRED(0.2, allocation=VisualContentAllocation(region="quadrant")),
    HiRED(0.2, selection=TopAttentionSelection(heads="max"), padding="ignore"),
    HiRED(Budget(64, per="tile")),
    FasterVLM(0.2),
    VTCCLS(0.1),
    ComponentReducer(0.2, allocation=ProportionalAllocation(), selection=TopAttentionSelection()),
    ComponentReducer(0.2, allocation=ScoreMassAllocation(), selection=TopAttentionSelection()),
]


def image(geometry: TileGeometry, seed: int = 0, device: str = "cpu") -> EncodedImage:
    """An image with the CLS attention of all 24 layers, and no features."""
    generator = torch.Generator().manual_seed(seed)
    rows = {
        ("cls_attention", layer): torch.rand(geometry.tiles, 4, geometry.tokens, generator=generator).to(device)
        for layer in range(24)
    }
    features = torch.zeros(geometry.tiles, geometry.tokens, 1, device=device)
    return EncodedImage(geometry.to(device), features, rows, layers=24, feature_layer=22)


@given(
    total=st.integers(0, 300),
    parts=st.lists(st.tuples(st.floats(0, 1, allow_subnormal=False), st.integers(0, 60)), min_size=1, max_size=12),
)
def test_budgets_are_divided_as_exactly(total: int, parts: list[tuple[float, int]]) -> None:
    weights, capacity = (list(one) for one in zip(*parts, strict=True))
    found = apportion_tensor(total, torch.tensor(weights, dtype=torch.float64), torch.tensor(capacity))
    exact = apportion(total, weights, capacity)
    assert int(found.sum()) == sum(exact) == min(total, sum(capacity))
    assert bool((found <= torch.tensor(capacity)).all())
    # Shares that are equal up to rounding may fall to another part.
    assert int((found - torch.tensor(exact)).abs().max()) <= 1


@pytest.mark.parametrize("reducer", ATTENTION, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("geometry", [SQUARE, PADDED, ONE], ids=["square", "padded", "one tile"])
def test_the_mask_is_what_select_keeps(reducer: ComponentReducer, geometry: TileGeometry) -> None:
    for seed in range(20):
        one = image(geometry, seed)
        assert torch.equal(reducer.mask(one), reducer.reduce(one).kept)


class OnOneDevice(TorchDispatchMode):
    """Refuses what cannot be captured in a CUDA graph: tensors elsewhere, and copies to or from there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        assert {one.device.type for one in tensors} <= {"cuda"}, func
        return out


@pytest.mark.parametrize("reducer", ATTENTION, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("geometry", [SQUARE, PADDED, ONE], ids=["square", "padded", "one tile"])
def test_the_mask_can_be_captured_in_a_cuda_graph(reducer: ComponentReducer, geometry: TileGeometry) -> None:
    """On a fake GPU, where reading a number raises; all shapes are known beforehand, since nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        one = image(geometry, device="cuda")
        assert one.geometry.valid.device.type == "cuda"  # read once before
        with OnOneDevice():
            mask = reducer.mask(one)
    assert (mask.device.type, mask.dtype) == ("cuda", torch.bool)
    assert tuple(mask.shape) == (geometry.tiles, geometry.tokens)


def test_what_no_cuda_graph_takes_is_noticed() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        one = image(SQUARE, device="cuda")
        with pytest.raises(DataDependentOutputException):
            HiRED(0.2).select(one)
        elsewhere = replace(one, geometry=image(SQUARE).geometry)
        HiRED(0.2).mask(elsewhere)  # which runs, with copies
        with pytest.raises(AssertionError, match="OpOverload"), OnOneDevice():
            HiRED(0.2).mask(elsewhere)


@pytest.mark.parametrize("reducer", ATTENTION[:2] + ATTENTION[6:8], ids=["HiRED", "HiRED 5 %", "FasterVLM", "VTCCLS"])
def test_one_graph_without_a_break(reducer: ComponentReducer) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(reducer.mask, fullgraph=True, backend=backend)
    first = image(SQUARE)
    assert first.geometry.valid.all()  # read once before
    for seed in range(5):
        one = replace(image(SQUARE, seed), geometry=first.geometry)
        assert torch.equal(compiled(one), reducer.reduce(one).kept)
    assert len(graphs) == 1  # another image of the same layout compiles nothing


@pytest.mark.parametrize(
    "reducer",
    [
        VisPruner(0.2),
        HiRED(Budget(100, newlines="counted")),
        ComponentReducer(0.2, allocation=GlobalTopAllocation(), selection=TopAttentionSelection()),
    ],
    ids=["VisPruner", "counted", "pool"],
)
def test_what_is_no_single_graph_says_so(reducer: ComponentReducer) -> None:
    with pytest.raises(ValueError, match=r"is no single graph: .* use select"):
        reducer.mask(image(SQUARE))


@pytest.mark.parametrize("reducer", [BaseTileOnly(0.2), HiRED.release(0.2), HiRED.paper(0.2)], ids=repr)
def test_allocations_without_shares_say_so(reducer: ComponentReducer) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=r"part of no compiled graph|is no single graph"):
        reducer.mask(image(SQUARE))


@pytest.mark.parametrize("compiled", ["tower layers", "tower", "projector", "language model", "whole model"])
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_compiled_parts_answer_the_same(compiled: str, budget: float) -> None:
    torch._dynamo.reset()
    inputs, reducer = batch("llava_next", [(112, 112)]), HiRED(budget)

    def answer(model: Any) -> Tensor:
        with torch.no_grad(), reducer(model):
            logits: Tensor = model(**inputs).logits
        return logits

    model = tiny_model("llava_next")
    expected = answer(model)
    base = model.base_model
    parts = {
        "tower layers": list(base.vision_tower.encoder.layers),
        "tower": [base.vision_tower],
        "projector": [base.multi_modal_projector],
        "language model": [base.language_model],
        "whole model": [model],
    }
    for part in parts[compiled]:
        part.compile(backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(answer(model), expected, atol=1e-4)


def test_a_static_budget_compiles_the_llm_once() -> None:
    """Without newlines that depend on the image, the prompt has one length."""
    torch._dynamo.reset()
    model, graphs = tiny_model("llava_next"), list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.base_model.language_model.compile(backend=backend)
    lengths, made = set(), []
    for seed in range(4):
        with torch.no_grad(), HiRED(0.3, newlines="drop")(model):
            lengths.add(model(**batch("llava_next", [(112, 112)], seed=seed)).logits.shape[1])
        made.append(len(graphs))
    assert len(lengths) == 1
    assert made[0] == made[-1] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_graph_replays_with_other_images() -> None:
    reducer, static = HiRED(0.2), image(SQUARE, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            reducer.mask(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = reducer.mask(static)
    for seed in range(5):
        other = image(SQUARE, seed, "cuda")
        for key, value in static.signals.items():
            value.copy_(other.signals[key])
        graph.replay()
        assert torch.equal(kept, reducer.reduce(other).kept)
