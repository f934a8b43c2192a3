"""Threads share an attached model, and interrupts in a call or a thread leave no hook."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import collect_state
from tokenprune.adapter import adapters
from tokenprune.prepared_call import PreparedCall
from tokenprune.strategies import HiRED
from tokenprune.testing.examples import build_example
from tokenprune.testing.tiny_models import batch, tiny_model


@pytest.mark.parametrize("name", ["LlavaNextAdapter", "Qwen2VLAdapter", "MllamaAdapter", "Phi4MultimodalAdapter"])
def test_threads_share_one_attached_model(name: str) -> None:
    example = build_example(adapters()[name])
    model = example.adapter.model
    calls = [example.build_inputs([[size]]) for size in [(112, 112), (56, 112), (112, 56), (56, 56)]]
    suppressed = [example.adapter.image_token_id]

    def compute_logits(index: int) -> Tensor:
        options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            generated = model.generate(**calls[index], suppress_tokens=suppressed, **options).logits[0]
            return torch.cat([generated, model(**calls[index]).logits[:, -1]])

    with HiRED(0.2)(model) as run:
        expected = [compute_logits(index) for index in range(4)]
        sequential_masks = [selection.kept for selection in run.selections]
    results: list[Any] = [None] * 16

    def run_thread(index: int) -> None:
        try:
            results[index] = compute_logits(index % 4)
        except Exception as error:
            results[index] = error

    plain = model(**calls[0]).logits
    with HiRED(0.2)(model) as run:
        threads = [Thread(target=run_thread, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, result in enumerate(results):
        assert isinstance(result, Tensor), result
        assert torch.equal(result, expected[index % 4])
    assert run.account.image_count == 32
    counts = [sum(torch.equal(kept, selection.kept) for selection in run.selections) for kept in sequential_masks[::2]]
    assert all(count >= 8 for count in counts)
    assert torch.equal(model(**calls[0]).logits, plain)
    assert not any("forward" in vars(module) for module in model.modules())


def test_blocks_of_several_threads_restore_the_model(model: Any, inputs: Any) -> None:
    """A second block on the same model raises an error that names the cause, in any order of the threads."""
    plain, messages = model(**inputs).logits, []

    def run_thread() -> None:
        for _ in range(3):
            try:
                with torch.no_grad(), HiRED(0.2)(model):
                    model(**inputs)
            except RuntimeError as error:
                messages.append(str(error))

    threads = [Thread(target=run_thread) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("already attached to this model" in message for message in messages)
    assert torch.equal(model(**inputs).logits, plain)
    assert "generate" not in vars(model)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_an_interrupt_inside_a_call(model: Any, inputs: Any) -> None:
    """The call after an interrupted call gives the logits of the unmodified model."""
    text = {name: inputs[name][:, -5:] for name in ("input_ids", "attention_mask")}
    plain = model(**text).logits

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with HiRED(0.2)(model):
        hook = model.get_output_embeddings().register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**text).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mllama", "phi4_multimodal"])
def test_an_interrupt_that_leaves_the_block(family: str) -> None:
    """A family that holds contexts during a call has its original outputs after the block, also in other threads."""
    model = tiny_model(family)
    inputs = batch(family, [(112, 112)])
    plain, before = model(**inputs).logits, collect_state(model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.get_output_embeddings().register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), HiRED(0.2)(model):
        model(**inputs)
    hook.remove()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(model(**inputs).logits), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert torch.equal(results[0], plain)
    assert collect_state(model) == before


@torch.no_grad()
def test_detach_during_a_call_of_another_thread(model: Any, inputs: Any) -> None:
    """The call in progress stays reduced, and its hooks are removed when it ends."""
    plain, entered, resume = model(**inputs).logits, threading.Event(), threading.Event()
    before = collect_state(model)

    def block_call(*args: Any) -> None:
        entered.set()
        resume.wait(60)

    handle = HiRED(0.2).attach(model)
    expected = model(**inputs).logits
    hook = model.get_output_embeddings().register_forward_pre_hook(block_call)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(model(**inputs).logits))
    thread.start()
    entered.wait(60)
    handle.detach()
    hook.remove()
    assert torch.equal(model(**inputs).logits, plain)
    resume.set()
    thread.join()
    assert torch.equal(results[0], expected)
    assert collect_state(model) == before


@torch.no_grad()
def test_hooks_are_removed_after_an_interrupted_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["phi4_multimodal"].model()
    inputs = FAMILIES["phi4_multimodal"].batch([(112, 112)])
    model(**inputs)
    state = collect_state(model)

    @contextmanager
    def fail(self: Any) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    def call_from_thread() -> None:
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)

    handle = HiRED(0.2).attach(model)
    with monkeypatch.context() as patch:
        patch.setattr(PreparedCall, "enter_contexts", fail)
        thread = threading.Thread(target=call_from_thread)
        thread.start()
        thread.join()
    handle.detach()
    assert collect_state(model) == state
