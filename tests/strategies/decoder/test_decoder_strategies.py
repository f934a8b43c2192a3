"""Every strategy inside the LLM spends its budget exactly at each cut, and survives copies and configurations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.catalog import strategies
from tokenprune.decoder_reducer import AtLayer, DecoderReducer, ScheduledReducer
from tokenprune.geometry import TileGeometry
from tokenprune.image import APPLICATION_SIGNALS, EncodedImage
from tokenprune.reducer import Composed
from tokenprune.strategies import FEATHER, VTW, DivPrune, FastV, HiRED, PyramidDrop, Random, SparseVLM, UniformStride
from tokenprune.testing import conformance

DECODER = sorted(name for name, kind in strategies().items() if kind.stage.name == "decoder" and kind is not AtLayer)
ANYRES = TileGeometry.anyres((60, 240), (1, 3), (6, 6), 56)
OFFLINE_CHECKS = sorted(set(conformance.CHECKS) - conformance.MODEL_CHECKS)


def later_image(reducer: DecoderReducer, layout: TileGeometry, share: float, seed: int = 0) -> EncodedImage:
    """Make the image of a later cut, at which a random share of the packed positions is left."""
    image = conformance.build_image(reducer, layout, seed)
    left = torch.rand(len(layout.packed), generator=torch.Generator().manual_seed(seed)) < share
    return replace(image, geometry=layout.restrict(left))


@pytest.mark.parametrize("name", sorted(name for name, kind in strategies().items() if kind.stage.name == "projector"))
def test_every_strategy_before_the_llm_can_be_composed(name: str) -> None:
    first, cut = strategies()[name](), FastV(layer=1)
    needs = (first >> cut).needs
    assert set(map(repr, needs)) == set(map(repr, [*first.needs, *cut.needs]))
    if not any(signal.kind in APPLICATION_SIGNALS for signal in first.needs):
        assert len((first >> AtLayer(1, first)).needs) == len(set(map(repr, first.needs)))


@pytest.mark.parametrize("layer", [True, "first", None, [1, 2], torch.tensor(1)])
def test_layers_that_are_no_numbers_raise(layer: Any) -> None:
    with pytest.raises(ValueError, match="neither an index nor a relative depth"):
        FastV(layer=layer)
    with pytest.raises(ValueError, match="neither an index nor a relative depth"):
        PyramidDrop(schedule=((layer, 0.5),))


def test_parts_of_a_composition_can_be_any_iterable() -> None:
    parts = [HiRED(0.4), FastV(layer=1)]
    assert Composed(tuple(parts)) == Composed(iter(parts)) == Composed(parts)  # type: ignore[arg-type]


def test_the_shipped_strategies_are_found() -> None:
    expected = {"DART", "FEATHER", "FastV", "PyramidDrop", "SparseVLM", "TransPrune", "V2Drop", "VTW", "VisionDrop"}
    assert expected == set(DECODER)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(10, 300), st.integers(10, 300)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    budget=st.one_of(st.integers(0, 200), st.floats(0, 1)),
    share=st.floats(0.1, 1),
    seed=st.integers(0, 50),
)
@pytest.mark.parametrize("name", DECODER)
@pytest.mark.filterwarnings("ignore::tokenprune.budget.OneTokenWarning")
def test_the_budget_is_spent_exactly_at_each_cut(name, size, grid, budget, share, seed) -> None:
    layout = TileGeometry.anyres(size, grid, (4, 4), 56)
    reducer: Any = strategies()[name](budget)
    for cut in reducer.cuts:
        at_cut = reducer.at_cut(cut)
        image = later_image(at_cut, layout, share, seed)
        selection = at_cut.reduce(image)
        assert selection.kept_tokens == min(selection.asked, image.geometry.valid_tokens)
        if isinstance(budget, float) and cut is reducer.cuts[-1]:
            assert selection.asked == at_cut.budget.asked(layout)
        if selection.mixing is not None:
            assert torch.allclose(selection.mixing.sum(dim=1), torch.ones(selection.kept_tokens), atol=1e-5)


@pytest.mark.parametrize("name", DECODER)
@pytest.mark.parametrize("check", OFFLINE_CHECKS)
def test_conformance_on_built_images(name: str, check: str) -> None:
    reducer: Any = strategies()[name]()
    for cut in reducer.cuts:
        conformance.CHECKS[check](reducer.at_cut(cut))


@pytest.mark.parametrize("options", [{"merging": "counted"}, {"rotary": "divide"}])
@pytest.mark.parametrize("check", ["exact budget", "spatial order", "needs", "round trips"])
def test_conformance_of_sparsevlm_variants(options: dict[str, Any], check: str) -> None:
    reducer = SparseVLM(**options)
    conformance.CHECKS[check](reducer.at_cut(reducer.cuts[0]))


@pytest.mark.parametrize("name", DECODER)
def test_whole_schedules_survive_copies_and_configurations(name: str) -> None:
    reducer: Any = strategies()[name](0.3)
    assert replace(reducer) == reducer
    assert conformance._reload_from_config(reducer) == reducer
    for cut in reducer.cuts:
        at_cut = reducer.at_cut(cut)
        assert [at_cut.at_cut(later) for later in at_cut.cuts] == [at_cut]


def test_a_ratio_scales_the_schedule_geometrically() -> None:
    assert [cut.budget for cut in PyramidDrop().cuts] == [0.5, 0.25, 0.125]
    assert [cut.budget for cut in PyramidDrop(0.125).cuts] == [0.5, 0.25, 0.125]
    assert [cut.budget for cut in PyramidDrop("51.2%").cuts] == pytest.approx([0.8, 0.64, 0.512])
    assert [cut.budget for cut in FEATHER().cuts] == [0.3, 0.09]
    assert [cut.budget for cut in PyramidDrop(40).cuts] == [0.5, 0.25, 40]


def test_only_the_first_cut_of_feather_keeps_evenly_spaced_tokens() -> None:
    reducer = FEATHER()
    first, last = (reducer.at_cut(cut) for cut in reducer.cuts)
    image = conformance.build_image(reducer, TileGeometry.single((6, 6)))
    assert bool(first.reduce(image).kept[0, [0, 3, 18, 21]].all())
    assert isinstance(last, FEATHER)
    assert last.stride == 0


def test_vtw_withdraws_all_tokens() -> None:
    assert VTW().reduce(conformance.build_image(VTW(), ANYRES)).kept_tokens == 0


@pytest.mark.parametrize("reducer", [DivPrune(0.2), Random(0.2), UniformStride(0.2), HiRED(0.2)])
def test_projector_strategies_act_at_a_cut(reducer) -> None:
    """Ratios refer to the tokens that entered the LLM; dropped tokens stay dropped."""
    strategy = AtLayer(2, reducer)
    at_cut = strategy.at_cut(strategy.cuts[0])
    image = later_image(at_cut, ANYRES, 0.6)
    selection = at_cut.reduce(image)
    assert selection.kept_tokens == int(0.2 * ANYRES.valid_tokens)
    assert not bool((selection.kept & ~image.geometry.valid).any())
    assert selection.newline_mask is not None
    assert len(selection.newline_mask) == image.geometry.newlines


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PyramidDrop(schedule=()), "at least one cut"),
        (lambda: PyramidDrop(schedule=((8, 0.2), (16, 0.5))), "a later cut keeps at most"),
        (lambda: PyramidDrop(schedule=((16, 0.5), (8, 0.2))), "ascend by layer"),
        (lambda: FastV(layer=0), "not inside an LLM"),
        (lambda: SparseVLM.release(100), "no version"),
    ],
)
def test_errors(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_layer_of_a_schedule_is_not_an_option() -> None:
    with pytest.raises(TypeError, match="layer"):
        PyramidDrop(layer=3)  # type: ignore[call-arg]
    assert isinstance(PyramidDrop(), ScheduledReducer)
