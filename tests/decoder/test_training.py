"""Gradients, gradient checkpointing and gradient accumulation with cuts inside the LLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.decoder import LargestStates, LargestStatesTwice, deepen, hide_dropped, visible_masks
from tests.helpers.families import FAMILIES

NAMES = ["llava_next", pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "gemma3"]


def load(name: str) -> tuple[Any, Any, Tensor]:
    family = FAMILIES[name]
    inputs = family.batch(*family.rows[:2], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, : labels.shape[1] // 2] = -100
    return deepen(family, 6).model(), inputs, labels


def read_gradients(model: Any) -> Tensor:
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradient


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_layer_oracle(name: str) -> None:
    model, inputs, labels = load(name)
    with LargestStatesTwice()(model) as run:
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    gradient = read_gradients(model)
    masks = visible_masks(model, inputs, run)
    visible = masks[-1][1]
    with hide_dropped(model, masks):
        logits = model(**inputs).logits
    losses = [
        torch.nn.functional.cross_entropy(row[kept][:-1], targets[kept][1:], reduction="none", ignore_index=-100)
        for row, kept, targets in zip(logits, visible, labels, strict=True)
    ]
    counted = torch.cat([targets[kept][1:] for kept, targets in zip(visible, labels, strict=True)]) != -100
    expected = torch.cat(losses)[counted].mean()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    oracle = read_gradients(model)
    assert float((gradient - oracle).abs().max()) < 1e-4 * float(oracle.abs().max())


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name: str, is_inside: bool, options: dict[str, Any]) -> None:
    """The backward pass repeats the layers, inside the block and after it."""
    model, inputs, labels = load(name)
    model.train()
    reducer = LargestStatesTwice()
    with reducer(model) as run:
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
    expected = read_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if options["use_reentrant"]:
        model.enable_input_require_grads()
    with reducer(model) as checkpointed:
        repeated = model(**inputs, labels=labels, use_cache=False).loss
        if is_inside:
            repeated.backward()
    if not is_inside:
        repeated.backward()
    assert float(repeated) == float(loss)
    gradient = read_gradients(model)
    assert float((gradient - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    pairs = zip(run.cuts[0].selections, checkpointed.cuts[0].selections, strict=True)
    assert all(torch.equal(first.kept, second.kept) for first, second in pairs)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_accumulated_gradients(checkpoints: bool) -> None:
    """Two forward passes before their backward passes: each repeats its own choice."""
    family = FAMILIES["llava_next"]
    model, _, _ = load("llava_next")
    model.train()
    batches = [family.batch([family.sizes[0]]), family.batch([family.sizes[1]], first=1)]

    def compute_loss(inputs: Any) -> Tensor:
        loss: Tensor = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        return loss

    separate = []
    for inputs in batches:
        with LargestStates()(model):
            compute_loss(inputs).backward()
        separate.append(read_gradients(model))
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with LargestStates()(model):
        losses = [compute_loss(inputs) for inputs in batches]
        for loss in losses:
            loss.backward()
    expected = separate[0] + separate[1]
    assert float((read_gradients(model) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
