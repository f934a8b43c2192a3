"""Below 100 %, logits, generated ids and gradients equal those of the masked full prompt."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.helpers.llava import GENERATION, POSITIONS, ROWS, SQUARE, TALL, WIDE
from tests.helpers.oracle import generate, kept_mask, oracle_inputs_1d, real_positions
from tokenprune import EncodedImage, Selection, TokenReducer
from tokenprune.adapter import find_adapter
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, tiny_model


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("newlines", ["keep_rows", "drop", "keep"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_logits_equal_the_mask_oracle(family: str, positions: str, side: str, newlines: str, attn: str) -> None:
    model, inputs = tiny_model(family, attn), batch(family, *ROWS, side=side)
    with HiRED(0.2, positions=positions, newlines=newlines)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    full = model(**oracle_inputs_1d(model, inputs, run, positions)).logits
    assert short.shape[1] < full.shape[1]
    difference = short[real_positions(model, inputs, run, side)] - full[kept_mask(model, inputs, run)]
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("padded", [True, False])
def test_generation_equals_the_mask_oracle(model: Any, family: str, positions: str, mode: str, padded: bool) -> None:
    """Without padding, transformers omits the mask and would treat gaps in positions as packed sequences."""
    inputs = batch(family, *(ROWS if padded else ([WIDE],)))
    with HiRED(0.2, positions=positions)(model) as run:
        short = generate(model, inputs, **GENERATION[mode])
    oracle = oracle_inputs_1d(model, inputs, run, positions)
    if positions == "reindex":
        oracle.pop("position_ids")
    else:  # generate counts positions from the attention mask of the full prompt
        oracle["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    options = GENERATION[mode] | ({"prefill_chunk_size": None} if mode == "chunked prefill" else {})
    full = generate(model, oracle, **options)
    assert torch.equal(short, full)
    width = inputs["input_ids"].shape[1]
    repeats = len(short) // len(inputs["input_ids"])
    assert torch.equal(short[:, :width], inputs["input_ids"].repeat_interleave(repeats, 0))


@pytest.mark.parametrize("source", ["argument", "config", "model"])
def test_positions_are_preserved_without_a_cache(family: str, source: str) -> None:
    """Without cache and padding, transformers would treat gaps in positions as packed sequences."""
    model, inputs = tiny_model(family), batch(family, [WIDE])
    reducer = HiRED(0.2, positions="preserve")
    with reducer(model):
        cached = generate(model, inputs)
        if source == "argument":
            assert torch.equal(generate(model, inputs, use_cache=False), cached)
        elif source == "config":
            config = copy.deepcopy(model.generation_config)
            config.use_cache = False
            assert torch.equal(generate(model, inputs, generation_config=config), cached)
        else:
            model.generation_config.use_cache = False
            assert torch.equal(generate(model, inputs), cached)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_assisted_generation_equals_greedy(model: Any, family: str, helper: str, positions: str) -> None:
    inputs = batch(family, [WIDE])
    assistant = tiny_model(family).eval()
    options = {"prompt_lookup_num_tokens": 2} if helper == "prompt lookup" else {"assistant_model": assistant}
    with HiRED(0.2, positions=positions)(model):
        greedy = generate(model, inputs)
        assisted = generate(model, inputs, **options)
    assert torch.equal(greedy, assisted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_equal_the_mask_oracle(family: str, side: str) -> None:
    """Loss and gradients are the same as for the masked full prompt with unlabeled dropped positions."""
    model, inputs = tiny_model(family), batch(family, [SQUARE], [WIDE, TALL], side=side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, : labels.shape[1] - 9] = -100
    with HiRED(0.2)(model) as run:
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("vision_tower" in name and g.abs().sum() > 0 for name, g in gradient.items())
    model.zero_grad()
    expected = model(**oracle_inputs_1d(model, inputs, run, "reindex"), labels=labels).loss
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in gradient:
            torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_unpadded_training_batch_gets_right_padding(family: str) -> None:
    """If the first text token has a label, it is not predicted from padding before it."""
    model = tiny_model(family)
    inputs = batch(family, [SQUARE], [SQUARE], seed=3)
    inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    inputs["input_ids"][1, -3:] = inputs["input_ids"][0, -3:]
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    with HiRED(3)(model) as run:
        loss = model(**inputs, labels=labels).loss
    is_kept = torch.ones_like(inputs["input_ids"]).bool()
    is_kept[inputs["input_ids"] == model.config.image_token_id] = torch.cat(
        [selection.packed_mask() for selection in run.selections]
    )
    rows = []
    for row, keep in enumerate(is_kept):
        row_inputs = {k: v[row : row + 1] for k, v in inputs.items() if k != "input_ids"}
        ids, mask = inputs["input_ids"][row : row + 1], keep[None].long()
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **row_inputs
        ).logits
        rows.append(torch.nn.functional.cross_entropy(logits[0, keep][:-1], labels[row, keep][1:], reduction="none"))
    expected = torch.cat(rows)[torch.cat([labels[r, k][1:] for r, k in enumerate(is_kept)]) != -100].mean()
    assert torch.allclose(loss, expected, atol=1e-5)


def test_gradient_checkpointing(family: str) -> None:
    model, inputs = tiny_model(family).train(), batch(family, [SQUARE])
    labels = inputs["input_ids"]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        with HiRED(0.2)(model):
            model(**inputs, labels=labels).loss.backward()
        gradients.append(model.base_model.multi_modal_projector.linear_1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_mixing_replaces_the_features_of_kept_tokens(model: Any, family: str) -> None:
    """One-hot rows change no feature. If every row averages all tokens, every kept token is the mean."""

    @dataclass
    class MixingReducer(TokenReducer):
        mean: bool = False

        def select(self, image: EncodedImage) -> Selection:
            kept = torch.zeros_like(image.geometry.valid)
            kept[:, ::5] = True
            kept &= image.geometry.valid
            order = image.geometry.packed[image.geometry.packed >= 0]
            rows = order[kept.flatten()[order]]
            mixing = torch.nn.functional.one_hot(rows, kept.numel()).float()
            if self.mean:
                mixing = (image.geometry.valid.flatten() / image.geometry.valid.sum()).expand(len(rows), -1)
            return Selection(image.geometry, kept, asked=len(rows), mixing=mixing)

    inputs = batch(family, [WIDE])
    with MixingReducer()(model, outputs="reduced") as run:
        one_hot = model(**inputs).logits
    full = model(**oracle_inputs_1d(model, inputs, run, "reindex")).logits
    assert (one_hot - full[kept_mask(model, inputs, run)][None]).abs().max() < 1e-5
    captured: list[Any] = []
    hook = model.base_model.register_forward_pre_hook(lambda m, a, k: captured.append(k), with_kwargs=True)
    with MixingReducer(mean=True, newlines="drop")(model) as run:
        model(**inputs)
    hook.remove()
    (features,) = captured[0]["mm_encoder_outputs"]["image"].pooler_output
    image = find_adapter(model).encode(inputs, ()).images[0]
    torch.testing.assert_close(features, image.features[image.geometry.valid].mean(0).expand_as(features))
