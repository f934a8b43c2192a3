"""Prepared calls: inferred masks, dtypes, layouts, features on demand, and inputs that are refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from tokenprune import Budget, EncodedImage, TileGeometry, align
from tokenprune.adapter import adapters, find_adapter
from tokenprune.pipeline import Pipeline
from tokenprune.rewrite import infer_attention_mask
from tokenprune.strategies import DivPrune, FasterVLM, HiRED, PruMerge, SpatialPooling, VisionZip
from tokenprune.testing.examples import build_example
from tokenprune.testing.tiny_models import batch, tiny_model


def test_a_full_mask_over_a_reduced_cache_is_refused(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model) as run, torch.no_grad():
        output = model(**inputs, use_cache=True)
        step = {"input_ids": output.logits[:, -1:].argmax(-1), "past_key_values": output.past_key_values}
        ones_column = torch.ones(2, 1, dtype=torch.long)
        with pytest.raises(ValueError, match=r"tokenprune.align\(attention_mask, run.rows\)"):
            model(**step, attention_mask=torch.cat([inputs["attention_mask"], ones_column], 1))
        short = torch.cat([align(inputs["attention_mask"], run.rows), ones_column], 1)
        positions = short.cumsum(1)[:, -1:] - 1
        continued = model(**step, attention_mask=short, position_ids=positions).logits[:, -1].argmax(-1)
        generated = model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(generated[:, -1], continued)


def test_the_mask_is_inferred_from_padding_as_generate_does(model: Any, inputs: Any) -> None:
    class Config:
        pad_token_id, eos_token_id = 0, [2]

    mask = infer_attention_mask(inputs["input_ids"], {}, Config, Config)
    assert mask is not None
    assert torch.equal(mask, inputs["attention_mask"])
    assert infer_attention_mask(inputs["input_ids"], {"eos_token_id": 0}, Config, Config) is None
    assert infer_attention_mask(inputs["input_ids"], {"pad_token_id": 390}, Config, Config) is None
    inputs_without_mask = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with HiRED(0.2)(model), torch.no_grad():
        assert torch.equal(
            model.generate(**inputs_without_mask, max_new_tokens=3), model.generate(**inputs, max_new_tokens=3)
        )


@torch.no_grad()
def test_half_precision_does_not_overflow() -> None:
    model, inputs = tiny_model("llava_next", attn="sdpa"), batch("llava_next", [(112, 112)])
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.bias.add_(220.0)
        layer.self_attn.k_proj.bias.add_(220.0)
    half_model = copy.deepcopy(model).half()
    half_inputs = {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}
    assert bool(half_model(**half_inputs).logits.isfinite().all())
    for reducer in (FasterVLM(0.2), HiRED(0.2), HiRED(0.2, attention="received")):
        with reducer(half_model) as run:
            half_model(**half_inputs)
        assert run.account.kept == run.account.asked


@pytest.mark.parametrize("reducer", [HiRED(0.2), VisionZip(0.2), PruMerge(0.2), SpatialPooling(0.2), DivPrune(0.2)])
@torch.no_grad()
def test_a_vision_side_of_another_dtype(inputs: Any, reducer: Any) -> None:
    """A float32 tower in a bfloat16 model keeps the same tokens as a float32 model."""
    model = tiny_model("llava_next")
    with reducer(model) as run:
        model(**inputs)
    model.to(torch.bfloat16)
    reference = tiny_model("llava_next")
    for name in ("vision_tower", "multi_modal_projector"):
        module = getattr(model.model, name).float()
        module.load_state_dict(getattr(reference.model, name).state_dict())
    with reducer(model) as mixed_run:
        model.generate(**inputs, max_new_tokens=1)
    for selection, mixed_selection in zip(run.selections, mixed_run.selections, strict=True):
        assert torch.equal(selection.kept, mixed_selection.kept)


def test_features_are_computed_when_they_are_read() -> None:
    """`dataclasses.replace` and the methods of an image do not compute the features."""
    from dataclasses import replace

    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.ones(1, 4, 3)

    image = EncodedImage(TileGeometry.single((2, 2)), compute_features=compute, device="cpu")
    flattened = replace(image.with_signals({("keys", 0): torch.zeros(1, 1, 4, 2)}), layers=3).flatten_tiles()
    assert not calls
    assert flattened.features.shape == (1, 4, 3)
    assert image.features is image.features
    assert len(calls) == 1
    assert image.with_features(torch.zeros(1, 4, 3)).features.sum() == 0
    with pytest.raises(TypeError, match="features"):
        EncodedImage(TileGeometry.single((2, 2)))


@pytest.mark.parametrize("name", sorted(adapters()))
def test_layouts_need_no_encoding(name: str) -> None:
    adapter_class = adapters()[name]
    if not adapter_class.supports_transformers():
        pytest.skip("the unmodified model raises in the installed transformers")
    example = build_example(adapter_class)
    adapter, inputs = example.adapter, example.build_inputs([[(112, 112)], [(60, 112)]])
    raising_hook = getattr(adapter, "tower", adapter.model).register_forward_pre_hook(lambda *_: 1 / 0)
    layouts = adapter.layouts(inputs)
    raising_hook.remove()
    with torch.no_grad():
        images = adapter.encode(inputs, ()).images
    assert [len(layout.packed) for layout in layouts] == [len(image.geometry.packed) for image in images]


def test_a_prepared_call_equals_a_call_inside_the_block(model: Any, inputs: Any) -> None:
    pipeline = Pipeline(HiRED(Budget(20)), find_adapter(model))
    call = pipeline.prepare(inputs)
    assert call.is_shortened
    assert call.inputs["input_ids"].shape == call.rows.index.shape
    with call.enter_contexts(), torch.no_grad():
        logits = model(**call.inputs).logits
    with HiRED(Budget(20))(model, outputs="reduced"), torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert [selection.kept_tokens for selection in call.selections] == [20, 20, 20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with HiRED(0.2)(model) as run:
            model(**inputs)
    assert "HiRED" in repr(run)


@torch.no_grad()
def test_a_model_without_a_cache(model: Any) -> None:
    """Generation without a cache gives the same tokens if `use_cache=False` comes from the generation config."""
    inputs, config = batch("llava_next", [(60, 160)]), GenerationConfig(max_new_tokens=4, pad_token_id=0)
    with HiRED(0.2, positions="preserve")(model):
        expected = model.generate(**inputs, generation_config=config, use_cache=False)
        model.generation_config.use_cache = False
        config.use_cache = None
        assert torch.equal(model.generate(**inputs, generation_config=config), expected)


@torch.no_grad()
def test_a_reduced_cache_is_refused_in_a_later_block(model: Any, inputs: Any) -> None:
    """A cache of a reduced prompt raises; caches of full prompts stay usable after a reduced call."""
    text_inputs = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_sizes")}
    full_cache = model(**inputs, use_cache=True).past_key_values
    extended = {name: torch.cat([value, value[:, -1:]], dim=1) for name, value in text_inputs.items()}
    next_inputs = {**extended, "input_ids": extended["input_ids"][:, -1:]}
    plain = model(**next_inputs, past_key_values=copy.deepcopy(full_cache)).logits
    with HiRED(0.2)(model):
        reduced = model(**inputs, use_cache=True).past_key_values
        generated = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
        assert torch.equal(model(**next_inputs, past_key_values=copy.deepcopy(full_cache)).logits, plain)
        continued = model.generate(**extended, past_key_values=copy.deepcopy(full_cache), max_new_tokens=2)
    assert torch.equal(
        continued, model.generate(**extended, past_key_values=copy.deepcopy(full_cache), max_new_tokens=2)
    )
    with FasterVLM(0.2)(model):
        model(**inputs)
        for cache in (reduced, generated, copy.deepcopy(reduced)):
            with pytest.raises(ValueError, match="cache that holds a reduced prompt"):
                model.generate(**extended, past_key_values=cache, max_new_tokens=2)
            with pytest.raises(ValueError, match="of a reduced prompt"):
                model(**next_inputs, past_key_values=cache)


@torch.no_grad()
def test_a_mask_over_image_tokens_is_refused(model: Any, inputs: Any) -> None:
    mask = inputs["attention_mask"].clone()
    mask[0, (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[3:8, 0]] = 0
    masked_inputs = {**inputs, "attention_mask": mask}
    plain = model(**masked_inputs).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**masked_inputs).logits, plain)
    with HiRED(0.2)(model):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="hides image tokens"):
                call(**masked_inputs)
        model(**inputs)


def test_shifted_labels_are_refused(model: Any, inputs: Any) -> None:
    labels = inputs["input_ids"]
    shifted_labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    with HiRED(0.2)(model), pytest.raises(ValueError, match="shift_labels"):
        model(**inputs, labels=labels, shift_labels=shifted_labels)
