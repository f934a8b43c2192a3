"""Kept masks inside torch.compile and CUDA graphs, and models with compiled parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.emulated_device import DEVICE, EmulatedDevice, to_cpu, to_device
from tokenprune.budget import Budget, apportion, apportion_tensor
from tokenprune.component_reducer import ComponentReducer
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.strategies import VTCCLS, BaseTileOnly, FasterVLM, HiRED, VisionZip
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
SINGLE = TileGeometry.single((24, 24))
REDUCERS = [
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
    ComponentReducer(0.2, allocation=GlobalTopAllocation(), selection=TopAttentionSelection()),
]


def make_image(geometry: TileGeometry, seed: int = 0, device: str = "cpu") -> EncodedImage:
    """Return an image with random CLS attention in all 24 layers, and features of zeros."""
    generator = torch.Generator().manual_seed(seed)
    signals = {
        ("cls_attention", layer): torch.rand(geometry.tiles, 4, geometry.tokens, generator=generator)
        for layer in range(24)
    }
    features = torch.zeros(geometry.tiles, geometry.tokens, 1)
    if device == DEVICE:
        features, signals = to_device(features), to_device(signals)
    return EncodedImage(geometry, features, signals, layers=24, feature_layer=22)


@given(
    total=st.integers(0, 300),
    parts=st.lists(st.tuples(st.just(0.0) | st.floats(1e-150, 1), st.integers(0, 60)), min_size=1, max_size=12),
)
@example(total=2, parts=[(0.0, 6), (1.0, 0), (1e-140, 2)])
@example(total=7, parts=[(0.0, 6), (1.0, 1), (1e-140, 2), (0.0, 3)])
def test_apportion_tensor_equals_apportion_up_to_rounding(total: int, parts: list[tuple[float, int]]) -> None:
    weights, capacity = (list(column) for column in zip(*parts, strict=True))
    shares = apportion_tensor(total, torch.tensor(weights, dtype=torch.float64), capacity)
    expected = apportion(total, weights, capacity)
    assert int(shares.sum()) == sum(expected) == min(total, sum(capacity))
    assert bool((shares <= torch.tensor(capacity)).all())
    # If two shares are equal up to rounding, the last token may go to either part.
    assert int((shares - torch.tensor(expected)).abs().max()) <= 1


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda reducer: type(reducer).__name__)
@pytest.mark.parametrize("geometry", [SQUARE, PADDED, SINGLE], ids=["square", "padded", "one tile"])
def test_mask_equals_the_kept_tokens_of_reduce(reducer: ComponentReducer, geometry: TileGeometry) -> None:
    for seed in range(20):
        image = make_image(geometry, seed)
        assert torch.equal(reducer.mask(image), reducer.reduce(image).kept)


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda reducer: type(reducer).__name__)
@pytest.mark.parametrize("geometry", [SQUARE, PADDED, SINGLE], ids=["square", "padded", "one tile"])
def test_the_mask_can_be_captured_in_a_cuda_graph(reducer: ComponentReducer, geometry: TileGeometry) -> None:
    """On an emulated accelerator, the mask is computed without a read and without a copy between devices."""
    image = make_image(geometry, device=DEVICE)
    with EmulatedDevice():
        reducer.mask(image)  # copies index tables to the device before capture
    with EmulatedDevice() as device:
        mask = reducer.mask(image)
    assert not device.reads
    assert not device.copies
    assert device.operators
    assert (mask.device.type, mask.dtype) == (torch.device(DEVICE).type, torch.bool)
    assert torch.equal(to_cpu(mask), reducer.reduce(make_image(geometry)).kept)


def test_reads_and_copies_between_devices_are_detected() -> None:
    image = make_image(SQUARE, device=DEVICE)
    with EmulatedDevice() as device:
        HiRED(0.2).reduce(image)  # raises the errors of its checks immediately
    assert device.reads
    with EmulatedDevice() as device:
        HiRED(0.2).mask(make_image(replace(SQUARE), device=DEVICE))  # copies the tables of a new layout
    assert not device.reads
    assert device.copies


@pytest.mark.parametrize("reducer", REDUCERS[:2] + REDUCERS[6:8], ids=["HiRED", "HiRED 5 %", "FasterVLM", "VTCCLS"])
def test_mask_compiles_to_one_graph(reducer: ComponentReducer) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(reducer.mask, fullgraph=True, backend=backend)
    first_image = make_image(SQUARE)
    reducer.mask(first_image)  # computes the index tables of the layout before compilation
    for seed in range(5):
        image = replace(make_image(SQUARE, seed), geometry=first_image.geometry)
        assert torch.equal(compiled(image), reducer.reduce(image).kept)
    assert len(graphs) == 1  # images of the same layout share one graph


@pytest.mark.parametrize(
    "reducer",
    [
        VisionZip(0.2),
        HiRED(Budget(100, newlines="counted")),
    ],
    ids=["VisionZip", "counted"],
)
def test_mask_refuses_reducers_without_a_single_graph(reducer: ComponentReducer) -> None:
    with pytest.raises(ValueError, match=r"is no single graph: .* use select"):
        reducer.mask(make_image(SQUARE))


@pytest.mark.parametrize("reducer", [BaseTileOnly(0.2), HiRED.release(0.2), HiRED.paper(0.2)], ids=repr)
def test_mask_refuses_allocations_without_shares(reducer: ComponentReducer) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=r"part of no compiled graph|is no single graph"):
        reducer.mask(make_image(SQUARE))


@pytest.mark.parametrize(
    "compiled",
    [
        *("tower layers", "projector", "language model"),
        *(pytest.param(part, marks=pytest.mark.slow) for part in ("tower", "full model")),
    ],
)
@pytest.mark.parametrize("budget", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_compiled_parts_give_the_same_logits(compiled: str, budget: float) -> None:
    torch._dynamo.reset()
    inputs, reducer = batch("llava_next", [(112, 112)]), HiRED(budget)

    def compute_logits(model: Any) -> Tensor:
        with torch.no_grad(), reducer(model):
            logits: Tensor = model(**inputs).logits
        return logits

    model = tiny_model("llava_next")
    expected = compute_logits(model)
    base = model.base_model
    parts = {
        "tower layers": list(base.vision_tower.encoder.layers),
        "tower": [base.vision_tower],
        "projector": [base.multi_modal_projector],
        "language model": [base.language_model],
        "full model": [model],
    }
    for part in parts[compiled]:
        part.compile(backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(compute_logits(model), expected, atol=1e-4)


def test_a_static_budget_compiles_the_llm_once() -> None:
    """If no newline tokens are kept, the prompt length does not depend on the image."""
    torch._dynamo.reset()
    model, graphs = tiny_model("llava_next"), list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.base_model.language_model.compile(backend=backend)
    lengths, graph_counts = set(), []
    for seed in range(4):
        with torch.no_grad(), HiRED(0.3, newlines="drop")(model):
            lengths.add(model(**batch("llava_next", [(112, 112)], seed=seed)).logits.shape[1])
        graph_counts.append(len(graphs))
    assert len(lengths) == 1
    assert graph_counts[0] == graph_counts[-1] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_graph_replays_with_other_images() -> None:
    reducer, static_image = HiRED(0.2), make_image(SQUARE, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            reducer.mask(static_image)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = reducer.mask(static_image)
    for seed in range(5):
        image = make_image(SQUARE, seed, "cuda")
        for key, value in static_image.signals.items():
            value.copy_(image.signals[key])
        graph.replay()
        assert torch.equal(kept, reducer.reduce(image).kept)
