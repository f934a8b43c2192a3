"""Strategies attach to models inside wrappers: PEFT, torch.compile, Accelerate and data parallel."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from tokenprune.attach import unwrap
from tokenprune.hooks import Hook
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import tiny_model


def wrap_with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()


WRAPPERS = {
    "peft": wrap_with_lora,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "compiled peft": lambda model: torch.compile(wrap_with_lora(model), backend="eager"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "compile" in name else ()) for name in WRAPPERS]
)
@torch.no_grad()
def test_wrappers(inputs: Any, name: str) -> None:
    """The wrapper gives the outputs of the wrapped model, also in `generate` if it has this method."""
    model = tiny_model("llava_next")
    plain = model(**inputs).logits
    with HiRED(0.2)(model) as run:
        expected, generated = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3)
    wrapped = WRAPPERS[name](model)
    hooks_before = [list(module._forward_hooks) for module in wrapped.modules()]
    with HiRED(0.2)(wrapped) as wrapped_run:
        torch.testing.assert_close(wrapped(**inputs).logits, expected)
        if hasattr(wrapped, "generate"):
            assert torch.equal(wrapped.generate(**inputs, max_new_tokens=3), generated)
    assert torch.equal(wrapped_run.selections[0].kept, run.selections[0].kept)
    assert [list(module._forward_hooks) for module in wrapped.modules()] == hooks_before
    torch.testing.assert_close(wrapped(**inputs).logits, plain)


@torch.no_grad()
def test_attaching_to_the_model_inside_a_wrapper(model: Any, inputs: Any) -> None:
    wrapped = nn.DataParallel(model)
    assert unwrap(wrapped) == ([wrapped], model)
    with HiRED(0.2)(model) as run:
        wrapped(**inputs)
    assert run.account.image_count == 3


def test_attaching_to_a_pipeline_object_names_its_model(model: Any) -> None:
    @dataclass
    class TextPipeline:
        model: Any

    with pytest.raises(TypeError, match=r"attach the strategy to its attribute \.model"):
        HiRED(0.2)(TextPipeline(model)).attach()


def test_copies_on_several_devices_are_refused(model: Any) -> None:
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    with pytest.raises(TypeError, match="use DistributedDataParallel"), HiRED(0.2)(wrapped):
        pass


@torch.no_grad()
def test_a_model_prepared_by_accelerate(inputs: Any) -> None:
    from accelerate import Accelerator

    model = tiny_model("llava_next")
    with HiRED(0.2)(model):
        expected, generated = model(**inputs).logits, model.generate(**inputs, max_new_tokens=2)
    prepared = Accelerator(cpu=True).prepare(model)
    with HiRED(0.2)(prepared):
        torch.testing.assert_close(prepared(**inputs).logits, expected)
        assert torch.equal(prepared.generate(**inputs, max_new_tokens=2), generated)


@torch.no_grad()
def test_distributed_data_parallel(inputs: Any, tmp_path: Any) -> None:
    model = tiny_model("llava_next")
    with HiRED(0.2)(model):
        expected = model(**inputs).logits
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with HiRED(0.2)(wrapped) as run:
            torch.testing.assert_close(wrapped(**inputs).logits, expected)
        assert run.account.image_count == 3
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def test_positional_arguments_of_a_wrapper(inputs: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_model("llava_next"), config).eval()
    vision = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    plain = wrapped(inputs["input_ids"], inputs["attention_mask"], **vision).logits
    with HiRED(1.0)(wrapped):
        assert torch.equal(wrapped(inputs["input_ids"], inputs["attention_mask"], **vision).logits, plain)


@torch.no_grad()
def test_copies_and_pickles_made_inside_the_block(model: Any, inputs: Any) -> None:
    """Copies are unmodified models without a reference to the strategy."""
    with HiRED(0.2)(model) as run:
        copies = [pickle.loads(pickle.dumps(model))]  # transformers' own hooks cannot be pickled after a call
        model(**inputs)
        copies.append(copy.deepcopy(model))
    assert run.account.image_count == 3
    copies.append(pickle.loads(pickle.dumps(copies[0])))
    plain, expected = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3)
    for model_copy in copies:
        assert torch.equal(model_copy(**inputs).logits, plain)
        assert torch.equal(model_copy.generate(**inputs, max_new_tokens=3), expected)
        assert not any(isinstance(hook, Hook) for hook in model_copy._forward_hooks.values())
        with HiRED(0.2)(model_copy) as run:
            model_copy(**inputs)
        assert run.account.image_count == 3


@torch.no_grad()
def test_virtual_tokens_of_prompt_tuning(inputs: Any) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = get_peft_model(tiny_model("llava_next"), config).eval()
    plain = wrapped(**inputs).logits
    with HiRED(0.2)(wrapped, outputs="reduced"):
        reduced = wrapped(**inputs).logits
    with HiRED(0.2)(wrapped) as run:
        logits = wrapped(**inputs).logits
    assert logits.shape == plain.shape
    assert torch.equal(logits[:, :4], reduced[:, :4])
    assert torch.equal(logits[:, 4:], run.rows.expand(reduced[:, 4:]))
