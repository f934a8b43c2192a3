"""At a budget of 100 %, logits, generated ids and gradients equal those of the unmodified model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.llava import GENERATION, ROWS
from tests.helpers.oracle import generate
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, tiny_model


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_budget_is_bit_identical(family: str, attn: str, dtype: torch.dtype, inputs: Any) -> None:
    model = tiny_model(family, attn, dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    before = model(**inputs).logits
    with HiRED(1.0)(model):
        during = model(**inputs).logits
    assert torch.equal(before, during)
    assert torch.equal(before, model(**inputs).logits)


@pytest.mark.parametrize("mode", GENERATION)
def test_full_budget_generates_the_same(model: Any, inputs: Any, mode: str) -> None:
    before = generate(model, inputs, **GENERATION[mode])
    with HiRED(1.0)(model):
        during = generate(model, inputs, **GENERATION[mode])
    assert torch.equal(before, during)
    assert torch.equal(before, generate(model, inputs, **GENERATION[mode]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_full_budget_trains_the_same(family: str, side: str) -> None:
    model, inputs = tiny_model(family), batch(family, *ROWS, side=side)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    losses, gradients = [], []
    for attached in (False, True):
        model.zero_grad()
        if attached:
            with HiRED(1.0)(model):
                loss = model(**inputs, labels=labels).loss
        else:
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)
