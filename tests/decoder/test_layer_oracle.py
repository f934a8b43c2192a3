"""Logits and tokens of a reduced LLM equal those of the unmodified model with a mask per layer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.decoder import (
    LargestStates,
    LargestStatesTwice,
    combine,
    generate_logits,
    hide_dropped,
    load_inputs,
    load_model,
    visible_masks,
)
from tests.helpers.families import FAMILIES
from tokenprune.decoder_reducer import AtLayer
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import DivPrune, HiRED

ENTRY = HiRED(0.4)
REDUCERS: dict[str, tuple[TokenReducer, TokenReducer | None, int]] = {
    "one cut": (LargestStates(), None, 0),
    "two cuts": (LargestStatesTwice(), None, 6),
    "composed": (ENTRY >> AtLayer(1, DivPrune(0.5)), ENTRY, 0),
}
"""The strategy, its part before the LLM, and the number of LLM layers; 0 means as in the family."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}
ALONE: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": "itself"},
}
"""Ways of generating for one prompt row."""


def load(name: str, kind: str) -> tuple[Any, Any]:
    if not FAMILIES[name].adapter.supports_transformers():
        pytest.skip("the unmodified model raises in the installed transformers")
    if FAMILIES[name].oracle is None:
        pytest.skip(f"masks cannot express the reduction: {FAMILIES[name].why}")
    return load_model(name, REDUCERS[kind][2]), load_inputs(name)


def difference(left: Tensor, right: Tensor) -> float:
    """Return the largest difference; equal infinite values do not differ."""
    return float((left - right).abs().nan_to_num(0.0, posinf=torch.inf).max())


@pytest.mark.parametrize(("name", "kind"), combine(2, list(FAMILIES), list(REDUCERS)))
@torch.no_grad()
def test_logits_equal_the_layer_oracle(name: str, kind: str) -> None:
    model, inputs = load(name, kind)
    reducer, entry, _ = REDUCERS[kind]
    full = model(**inputs).logits
    with reducer(model, outputs="reduced") as run:
        logits = model(**inputs).logits
    masks = visible_masks(model, inputs, run)
    counts = [mask.sum() for _, mask in masks]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < run.rows.mask.sum()
    with ExitStack() as stack:
        if entry is not None:
            stack.enter_context(entry(model, outputs="reduced"))
        before = model(**inputs).logits
        with hide_dropped(model, masks):
            expected = model(**inputs).logits
    last = masks[-1][1]
    assert difference(logits[last], expected[last]) < 1e-5
    assert difference(before[last], expected[last]) > 1e-3
    assert torch.equal(model(**inputs).logits, full)


@pytest.mark.parametrize(("name", "kind", "way"), combine(5, list(FAMILIES), list(REDUCERS), [*WAYS, *ALONE]))
@torch.no_grad()
def test_generated_logits_equal_the_layer_oracle(name: str, kind: str, way: str) -> None:
    model, inputs = load(name, kind)
    family = FAMILIES[name]
    if not family.beams and way in ("beams", "sampling"):
        pytest.skip(family.why)
    if way == "assistant" and name == "phi4_multimodal":
        pytest.skip("the unmodified model raises if it assists itself")
    if way in ALONE:
        inputs = family.batch(family.rows[0])
    options = {k: model if v == "itself" else v for k, v in {**WAYS, **ALONE}[way].items()}
    reducer, entry, _ = REDUCERS[kind]
    with reducer(model) as run:
        tokens, logits = generate_logits(model, inputs, **options)
    with ExitStack() as stack:
        if entry is not None:
            stack.enter_context(entry(model))
        stack.enter_context(hide_dropped(model, visible_masks(model, inputs, run)))
        expected_tokens, expected = generate_logits(model, inputs, **options)
    assert torch.equal(tokens, expected_tokens)
    assert difference(logits, expected) < 1e-5
