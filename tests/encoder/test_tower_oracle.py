"""A reduced tower equals the full tower with hidden keys, in all families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.encoder import (
    SINGLE,
    LargestPatches,
    LargestPatchesBefore,
    encode_hidden,
    encode_reduced,
    load,
    prepare,
)
from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.encoder.patches import RemainingPatches
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.models._capture.layer_call import LayerCall
from tokenprune.strategies import HiRED
from tokenprune.strategies.encoder import EViT, RandomPatches, ToMe

ROUNDING = {*SINGLE, "ovis2"}
"""Families whose models compute in float32; all others are compared in float64."""


def load_supported(name: str, step: str = "drop") -> tuple[Any, Any]:
    adapter = FAMILIES[name].adapter
    if not adapter.supports_transformers():
        pytest.skip("the unmodified model raises in the installed transformers")
    if step not in adapter.patch_steps:
        pytest.skip(f"the tower does not support steps that {step} patches")
    return load(name)


@pytest.mark.parametrize("reducer", [LargestPatches(), LargestPatchesBefore()], ids=["inside", "before"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_patches_equal_hidden_keys(name: str, reducer: EncoderReducer) -> None:
    model, inputs = load_supported(name)
    encoding, reduction = encode_reduced(model, inputs, reducer)
    expected = encode_hidden(model, inputs, reduction)
    assert reduction.passes[0].number < reduction.passes[0].entry.shape[1]
    tolerance = 1e-9 if name not in ROUNDING else 1e-5
    for tokens, oracle in zip(encoding.packed, expected, strict=True):
        assert (tokens - oracle).abs().max() < tolerance * max(1.0, float(oracle.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_halves_equal_the_layer(name: str) -> None:
    model, inputs = load_supported(name)
    adapter: Any = find_adapter(model)
    layer = adapter.tower_layers[1]
    outputs = []

    def compare(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        call = LayerCall(module, module.forward, adapter.attention_name, adapter.tower_mlp_name, args, kwargs)
        hidden = call.hidden
        patches = hidden.shape[1] - int(adapter.has_cls)
        remaining = RemainingPatches.all(len(hidden), patches, adapter.cls, hidden.device)
        sequence, length = call.run_attention(hidden, remaining)
        halves = call.restore(call.run_mlp(sequence, remaining, length), remaining)
        pair = [value[0] if isinstance(value, tuple) else value for value in (halves, output)]
        outputs.append(torch.equal(*pair))

    hook = layer.register_forward_hook(compare, with_kwargs=True)
    try:
        with torch.no_grad():
            adapter.encode(inputs, ())
    finally:
        hook.remove()
    assert outputs
    assert all(outputs)


@pytest.mark.parametrize(
    "reducer", [ToMe(r=0), EViT(1.0), RandomPatches(1.0), ToMe(1.0)], ids=lambda r: f"{r.label} {r.budget_label}"
)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_patches_equal_the_unmodified_model(name: str, reducer: EncoderReducer) -> None:
    model, inputs = load_supported(name, "merge" if reducer.merges else "drop")
    with torch.no_grad():
        expected = model(**inputs)
        with reducer(model):
            output = model(**inputs)
    assert torch.equal(output.logits, expected.logits)
    assert list(output.keys()) == list(expected.keys())


@pytest.mark.parametrize(
    "reducer", [ToMe(r=1) >> HiRED(0.3), EViT() >> HiRED(0.2), RandomPatches(0.5)], ids=lambda reducer: reducer.label
)
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_equal_single_rows(name: str, reducer: EncoderReducer) -> None:
    parts = reducer.list_parts()
    model, _ = load_supported(name, "merge" if parts[0].merges else "drop")
    family = FAMILIES[name]
    inputs = prepare(name, *family.rows[:2])
    with torch.no_grad(), reducer(model):
        together = model(**inputs).logits[:, -1]
        rows = [prepare(name, row, first=number) for number, row in enumerate(family.rows[:2])]
        alone = torch.stack([model(**row).logits[0, -1] for row in rows])
    assert (together - alone).abs().max() < 1e-5 * max(1.0, float(alone.abs().max()))
