"""A model is unmodified after the block, also after errors and interrupts, and so are its copies."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.helpers.llava import ROWS, SQUARE, WIDE
from tests.helpers.oracle import collect_state, generate
from tokenprune import EncodedImage, ScoreReducer, TokenReducer
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, tiny_model


class InjectedError(Exception):
    pass


@dataclass
class FailingReducer(ScoreReducer):
    error: Any = InjectedError

    def score(self, image: EncodedImage) -> torch.Tensor:
        raise self.error("in the strategy")


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("failure", ["none", "strategy", "model", "interrupt", "caller"])
def test_leaving_restores_the_model(family: str, failure: str, call: str) -> None:
    model, inputs = tiny_model(family), batch(family, *ROWS)
    logits, before = model(**inputs).logits, collect_state(model)
    run_model = model if call == "forward" else lambda **kw: generate(model, kw)
    reducer: TokenReducer = FailingReducer() if failure == "strategy" else HiRED(0.2)
    call_inputs = dict(inputs)
    if failure == "model":
        call_inputs["input_ids"] = call_inputs["input_ids"][:, :-1].clone()
        call_inputs["attention_mask"] = call_inputs["attention_mask"][:, :-1]
        call_inputs["input_ids"][0, -1] = model.config.image_token_id
    error: Any = {
        "strategy": InjectedError,
        "model": ValueError,
        "interrupt": KeyboardInterrupt,
        "caller": InjectedError,
    }.get(failure)
    if failure == "interrupt":
        reducer = FailingReducer(error=KeyboardInterrupt)
    if error is None:
        with reducer(model):
            run_model(**inputs)
    else:
        with pytest.raises(error) as caught, reducer(model):  # noqa: PT012
            run_model(**call_inputs)
            raise InjectedError("in the caller")
        assert failure != "model" or "Image features and image tokens do not match" in str(caught.value)
    assert collect_state(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_an_error_inside_the_vision_tower_restores_the_model(family: str) -> None:
    model, inputs = tiny_model(family), batch(family, [SQUARE])
    model(**inputs)  # transformers installs capturing hooks at the first call
    before = collect_state(model)
    hook = model.base_model.vision_tower.encoder.layers[-2].register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError), HiRED(0.2)(model):
        model(**inputs)
    hook.remove()
    assert collect_state(model) == before


def test_an_instance_attribute_generate_is_restored(family: str) -> None:
    model, inputs = tiny_model(family), batch(family, [SQUARE])
    replacement = type(model).generate.__get__(model)
    model.generate = replacement
    with HiRED(0.2)(model):
        generate(model, inputs)
    assert model.__dict__["generate"] is replacement


def test_copies_and_checkpoints_from_inside_the_block_are_not_reduced(family: str, tmp_path: Any) -> None:
    model, inputs = tiny_model(family), batch(family, [WIDE])
    full = generate(model, inputs)
    logits = model(**inputs).logits
    with HiRED(2)(model) as run:
        model_copy = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
        model(**inputs)
        image_count = len(run.selections)
        assert torch.equal(generate(model_copy, inputs), full)
        assert torch.equal(model_copy(**inputs).logits, logits)
        assert len(run.selections) == image_count
    assert torch.equal(generate(model_copy, inputs), full)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, logits)


def test_an_error_in_a_block_without_an_image_is_raised(model: Any) -> None:
    with pytest.raises(InjectedError), HiRED(0.2)(model):
        raise InjectedError
