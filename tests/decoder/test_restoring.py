"""Nothing is left behind on the model, and threads share an attached model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.decoder import LargestStates, generate_logits, load_inputs
from tests.helpers.families import FAMILIES
from tests.helpers.oracle import collect_state
from tokenprune.adapter import find_adapter
from tokenprune.image import EncodedImage
from tokenprune.strategies import HiRED

NAME = "llava_next"
CALLS = {
    "forward": lambda model, inputs: model(**inputs).logits,
    "generate": lambda model, inputs: model.generate(**inputs, max_new_tokens=3),
    "beams": lambda model, inputs: model.generate(**inputs, max_new_tokens=3, num_beams=2),
}


@dataclass
class FailingStates(LargestStates):
    """Raises an error at the cut."""

    error: type[BaseException] = ZeroDivisionError

    def score(self, image: EncodedImage) -> Tensor:
        """Raise the error."""
        raise self.error


@pytest.fixture
def model() -> Any:
    model = FAMILIES[NAME].model()
    with torch.no_grad():  # transformers installs its own capturing hooks at the first call
        model(**load_inputs(NAME))
        model.generate(**load_inputs(NAME), max_new_tokens=2)
    return model


def collect(model: Any) -> Any:
    """Return the state of the model, and the hooks of its LLM."""
    modules = find_adapter(model).decoder_modules  # type: ignore[attr-defined]
    hooks = [list(layer._forward_pre_hooks) + list(layer._forward_hooks) for layer in modules.layers]
    return collect_state(model), hooks


@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_after_success(model: Any, call: str) -> None:
    before, inputs = collect(model), load_inputs(NAME)
    expected = CALLS[call](model, inputs)
    with LargestStates()(model):
        CALLS[call](model, inputs)
        assert collect(model) != before
    assert collect(model) == before
    assert torch.equal(CALLS[call](model, inputs), expected)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["forward", "generate", pytest.param("beams", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["select", "layer", "later layer", "after the layers"])
@torch.no_grad()
def test_after_an_error(model: Any, call: str, place: str, error: type[BaseException]) -> None:
    """The next call in the block, and the model after the block, are as if the call had not happened."""
    inputs = load_inputs(NAME)
    expected = CALLS[call](model, inputs)
    with LargestStates()(model):
        reduced = CALLS[call](model, inputs)
    before = collect(model)

    def fail(*_: Any) -> None:
        raise error

    if place == "select":
        with pytest.raises(error), FailingStates(error=error)(model):
            CALLS[call](model, inputs)
    else:
        layers = find_adapter(model).decoder_modules.layers  # type: ignore[attr-defined]
        modules = {"layer": layers[1].mlp, "later layer": layers[-1].self_attn, "after the layers": model.lm_head}
        with LargestStates()(model) as run:
            handle = modules[place].register_forward_hook(fail)
            with pytest.raises(error):
                CALLS[call](model, inputs)
            handle.remove()
            assert torch.equal(CALLS[call](model, inputs), reduced)
        assert len(run.cuts[0].selections) in (4, 8)
    assert collect(model) == before
    assert torch.equal(CALLS[call](model, inputs), expected)


@pytest.mark.parametrize("place", ["layer", "later layer"])
@torch.no_grad()
def test_a_call_of_text_after_an_interrupt(model: Any, place: str) -> None:
    """A plan of an interrupted call does not apply to the next call without images."""
    inputs = load_inputs(NAME)
    text = {name: inputs[name][2:3] for name in ("input_ids", "attention_mask")}
    expected = model(**text).logits

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    layers = find_adapter(model).decoder_modules.layers  # type: ignore[attr-defined]
    with LargestStates()(model) as run:
        handle = layers[1 if place == "layer" else -1].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**text).logits, expected)
        model(**inputs)
    assert run.cuts


@torch.no_grad()
def test_copies_inside_the_block_are_unmodified(model: Any) -> None:
    inputs = load_inputs(NAME)
    expected = model(**inputs).logits
    with LargestStates()(model):
        duplicate = copy.deepcopy(model)
        assert torch.equal(duplicate(**inputs).logits, expected)
        assert not torch.equal(model(**inputs).logits, expected)
    assert torch.equal(duplicate(**inputs).logits, expected)


@pytest.mark.parametrize("is_composed", [False, True])
def test_threads_share_one_attached_model(model: Any, is_composed: bool) -> None:
    """Each thread has its own plan, for images of different layouts."""
    family = FAMILIES[NAME]
    calls = [family.batch([size], first=number) for number, size in enumerate(family.sizes)]
    reducer = HiRED(0.4) >> LargestStates() if is_composed else LargestStates()

    def compute(number: int) -> Tensor:
        with torch.no_grad():
            _, logits = generate_logits(model, calls[number], max_new_tokens=3, min_new_tokens=3)
            return torch.cat([logits[:, 0], model(**calls[number]).logits[0, -1:]])

    with reducer(model):
        expected = [compute(number) for number in range(4)]
    results: list[Any] = [None] * 12

    def run_thread(index: int) -> None:
        try:
            results[index] = compute(index % 4)
        except Exception as error:
            results[index] = error

    before = collect(model)
    with reducer(model) as run:
        threads = [Thread(target=run_thread, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, result in enumerate(results):
        assert isinstance(result, Tensor), result
        assert torch.equal(result, expected[index % 4])
    assert len(run.cuts[0].selections) == 24
    assert collect(model) == before
