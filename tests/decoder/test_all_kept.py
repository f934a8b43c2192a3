"""Cuts that keep all tokens change no bit of an output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.decoder import LargestStates, LargestStatesTwice, generate_logits, load_inputs, load_model
from tests.helpers.outputs import list_differences
from tokenprune.decoder_reducer import AtLayer
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import HiRED, UniformStride
from tokenprune.testing.families.base import Family

REDUCERS: dict[str, TokenReducer] = {
    "one cut": AtLayer(1, UniformStride(1.0)),
    "more tokens than the image": LargestStates(10_000),
    "composed": HiRED(1.0) >> LargestStates(1.0),
}
KINDS = [pytest.param(kind, marks=[] if kind == "composed" else [pytest.mark.slow]) for kind in REDUCERS]


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    return family.model()


@pytest.fixture(scope="module")
def inputs(family: Family) -> Any:
    return load_inputs(family.name)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs(family: Family, model: Any, inputs: Any, kind: str) -> None:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 3, "do_sample": False}

    def collect() -> list[Any]:
        outputs = [model(**inputs, labels=labels, use_cache=True), model.generate(**inputs, **options)]
        return [*outputs, model.generate(**inputs, num_beams=2, **options)] if family.beams else outputs

    before = collect()
    with REDUCERS[kind](model) as run:
        during = collect()
    assert run.cuts
    assert all(selection.is_identity for cut in run.cuts for selection in cut.selections)
    assert list_differences(before, during) == []
    assert list_differences(before, collect()) == []


@torch.no_grad()
def test_a_schedule_that_drops_nothing_at_first() -> None:
    model, inputs = load_model("llava_next", 6), load_inputs("llava_next")
    with LargestStates(0.3, layer=4)(model):
        expected = generate_logits(model, inputs)
    with LargestStatesTwice(schedule=((2, 1.0), (4, 0.3)))(model) as run:
        assert list_differences(generate_logits(model, inputs), expected) == []
    assert [all(s.is_identity for s in cut.selections) for cut in run.cuts] == [True, False]
