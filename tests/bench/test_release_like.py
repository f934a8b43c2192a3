"""The release-like baseline: its tokens, its embeddings, and that the model is as before."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.bench import SIZES
from tokenprune.adapter import find_adapter
from tokenprune.budget import Budget, OneTokenWarning
from tokenprune.experiments.bench.bench_model import BenchModel
from tokenprune.experiments.bench.measure import (
    PLAIN,
    Measurement,
    Variant,
    count_tokens,
    count_work,
    find_release_budget,
    generate_once,
    list_variants,
)
from tokenprune.experiments.bench.release_like import (
    as_supported,
    build_inputs_embeds,
    eager_attention,
    select_top_tokens,
)
from tokenprune.geometry import NEWLINE
from tokenprune.models.internvl import InternVLAdapter
from tokenprune.models.llava_onevision import LlavaOnevisionAdapter
from tokenprune.models.vipllava import VipLlavaAdapter
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import FastV, HiRED, ToMe
from tokenprune.strategies.components.allocation import VisualContentAllocation
from tokenprune.testing.examples import find_example
from tokenprune.testing.tiny_models import batch, tiny_model

PADDED = [[(60, 112)], [(60, 112)]]
"""Images of which half of the tokens of each sub-image are not valid."""


def run_baseline(family: str, sizes: Any, budget: int | float) -> tuple[Any, Mapping[str, Any], dict[str, Tensor]]:
    model, inputs = tiny_model(family), dict(batch(family, *sizes))
    adapter = as_supported(find_adapter(model))
    with torch.inference_mode(), eager_attention(adapter.tower):
        return adapter, inputs, build_inputs_embeds(adapter, inputs, budget)


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.0556, 0.5, 0.99, 1, 7])
@pytest.mark.parametrize(("family", "sizes"), [("llava_next", SIZES), ("llava_next", PADDED), ("llava", SIZES)])
@pytest.mark.filterwarnings("ignore::tokenprune.budget.OneTokenWarning")
def test_as_many_tokens_as_hired(family: str, sizes: Any, budget: int | float) -> None:
    model, inputs = tiny_model(family), dict(batch(family, *sizes))
    bench_model = BenchModel("tiny", model, find_adapter(model), "random", 2, 2, lambda images: inputs)
    baseline = Measurement(Variant("release-like", release_budget=budget))
    reduced = Measurement(Variant("HiRED", HiRED(budget, newlines="drop")))
    for measurement in (baseline, reduced):
        count_tokens(bench_model, inputs, measurement)
    assert (baseline.prompt, baseline.visual) == (reduced.prompt, reduced.visual)
    assert baseline.kv_bytes == reduced.kv_bytes
    assert baseline.visual < int(bench_model.adapter.placeholders(inputs).sum())


@pytest.mark.parametrize("budget", [0.3, 9])
@pytest.mark.parametrize("sizes", [SIZES, PADDED])
def test_the_tokens_of_hired_with_stripes(sizes: Any, budget: int | float) -> None:
    """HiRED's own capture and allocation select the same tokens, if sub-images map to stripes."""
    model, inputs = tiny_model("llava_next"), dict(batch("llava_next", *sizes))
    adapter = as_supported(find_adapter(model))
    layouts, layer = adapter.layouts(inputs), adapter.feature_layer(inputs)
    pixels = torch.cat([tiles[: layout.tiles] for tiles, layout in zip(inputs["pixel_values"], layouts, strict=True)])
    with torch.inference_mode(), eager_attention(adapter.tower):
        maps = adapter.tower(pixels, output_attentions=True).attentions
    early, late = (maps[index].sum(dim=1)[:, 0, 1:] for index in (0, layer))
    indices = select_top_tokens(early, late, layouts, budget)
    allocation = VisualContentAllocation(region="stripe")
    with torch.inference_mode(), HiRED(budget, newlines="drop", allocation=allocation)(model) as run:
        model(**inputs)
    for index, selection, layout in zip(indices, run.selections, layouts, strict=True):
        assert sorted(index.tolist()) == selection.kept.flatten().nonzero()[:, 0].tolist()
        packed = layout.packed.tolist()
        positions = [packed.index(number) for number in index.tolist()]
        assert positions == sorted(positions)


@pytest.mark.parametrize("budget", [1.0, 10_000], ids=["100 %", "more tokens than the image has"])
@pytest.mark.parametrize(("family", "sizes"), [("llava_next", PADDED), ("llava", SIZES)])
def test_the_complete_embeddings_are_those_of_the_model(family: str, sizes: Any, budget: int | float) -> None:
    """If all tokens are kept, the prompt is that of the model without newline tokens."""
    adapter, inputs, reduced = run_baseline(family, sizes, budget)
    model, layouts = adapter.model, adapter.layouts(inputs)
    captured: list[Tensor] = []
    hook = model.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: captured.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.inference_mode():
            model(**inputs)
    finally:
        hook.remove()
    for row, (ids, layout) in enumerate(zip(inputs["input_ids"], layouts, strict=True)):
        entries = iter(layout.packed.tolist())
        is_newline = [token == adapter.image_token_id and next(entries) == NEWLINE for token in ids.tolist()]
        expected = captured[0][row][~torch.tensor(is_newline)]
        torch.testing.assert_close(reduced["inputs_embeds"][row], expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(reduced["attention_mask"][row], inputs["attention_mask"][row][~torch.tensor(is_newline)])


def read_state(model: Any) -> list[Any]:
    return [
        model.config.to_dict(),
        [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        [sorted(vars(module)) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    ]


def test_the_model_is_as_before(tiny: BenchModel, inputs: Any) -> None:
    tiny.model(**inputs)  # transformers installs its own hooks for hidden states in the first call
    before = read_state(tiny.model)
    variant = Variant("release-like", release_budget=0.3)
    generate_once(tiny, inputs, variant, 2)
    count_work(tiny, inputs, Measurement(variant))
    assert read_state(tiny.model) == before
    with suppress(KeyError), eager_attention(as_supported(tiny.adapter).tower):
        assert read_state(tiny.model) != before
        raise KeyError
    assert read_state(tiny.model) == before


def test_the_baseline_encodes_completely(tiny: BenchModel, inputs: Any) -> None:
    plain, baseline = Measurement(Variant(PLAIN)), Measurement(Variant("release-like", release_budget=0.3))
    for measurement in (plain, baseline):
        count_work(tiny, inputs, measurement)
    assert plain.flops is not None
    assert baseline.flops is not None
    for phase in ("vision encode", "projector"):
        assert baseline.flops[phase] == plain.flops[phase]
    assert baseline.flops["prefill"] < plain.flops["prefill"]
    assert baseline.memory["tensors"] > 0


@pytest.mark.parametrize("adapter", [LlavaOnevisionAdapter, InternVLAdapter, VipLlavaAdapter])
def test_other_families_are_named(adapter: Any) -> None:
    model = find_example(adapter).build_model()
    with pytest.raises(ValueError, match=f"cannot run {adapter.family} with this vision tower"):
        as_supported(find_adapter(model))


def test_reducers_are_compared_to_the_baseline_of_their_budget() -> None:
    variants = list_variants([("full", HiRED(1.0)), ("a", HiRED(0.2)), ("b", HiRED("5%"))], [0.2, 0.05])
    assert [variant.name for variant in variants] == [PLAIN, "release-like 20 %", "release-like 5 %", "full", "a", "b"]
    assert [variant.reference for variant in variants[3:]] == [None, "release-like 20 %", "release-like 5 %"]
    assert [variant.is_plain for variant in variants] == [True] + 5 * [False]


def test_numbers_of_tokens_are_compared_to_the_baseline_of_that_number() -> None:
    with pytest.warns(OneTokenWarning):
        reducers = [("full", HiRED(1.0)), ("one", HiRED(1)), ("many", HiRED(160)), ("share", HiRED(0.2))]
    variants = list_variants(reducers, [1, 160])
    assert [variant.name for variant in variants[1:3]] == ["release-like 1 token", "release-like 160 tokens"]
    references = [None, "release-like 1 token", "release-like 160 tokens", None]
    assert [variant.reference for variant in variants[3:]] == references


@pytest.mark.parametrize(
    "reducer",
    [
        HiRED(1.0),
        HiRED(0),
        HiRED(Budget(0.2, per="tile")),
        HiRED(Budget(0.2, of="unpadded")),
        HiRED(Budget(0.2, newlines="counted")),
        FastV(0.2),
        ToMe(r=2) >> HiRED(0.2),
    ],
    ids=lambda reducer: str(reducer.budget_label),
)
def test_budgets_that_the_baseline_does_not_have(reducer: TokenReducer) -> None:
    assert find_release_budget(reducer) is None
    assert [variant.reference for variant in list_variants([("a", reducer)], [0.2])][2:] == [None]


def test_compiled_variants_follow_the_variants_below_the_full_budget() -> None:
    variants = list_variants([("full", HiRED(1.0)), ("a", HiRED(0.2))], [0.2], compiled=True)
    names = [(variant.name, variant.is_compiled, variant.reference) for variant in variants[2:]]
    baseline = "release-like 20 %"
    assert names == [("full", False, None), ("a", False, baseline), ("a compiled", True, baseline)]
    with pytest.warns(OneTokenWarning):
        one_token = HiRED(1)
    assert [variant.name for variant in list_variants([("one", one_token)], compiled=True)][1:] == [
        "one",
        "one compiled",
    ]
