"""Calls that a cut inside the LLM refuses, with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from tests.helpers.decoder import (
    LargestStates,
    LargestStatesTwice,
    deepen,
    generate_logits,
    load_inputs,
    load_model,
)
from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.cuts import Cut, resolve_cuts
from tokenprune.decoder_reducer import AtLayer
from tokenprune.strategies import UniformStride
from tokenprune.testing import families

NAME = "llava_next"
FLASH = "tests_flash"


def compute_flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention with the interface of flash kernels: 2-D masks, and windows that count stored entries."""
    rows, _, queries, _ = query.shape
    keys = key.shape[2]
    distance = (torch.arange(queries) + keys - queries)[:, None] - torch.arange(keys)
    allowed = (distance >= 0)[None, None].expand(rows, 1, -1, -1)
    if (window := kwargs.get("sliding_window")) is not None:
        allowed = allowed & (distance < window)
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        allowed = allowed & attention_mask[:, None, None, -keys:].bool()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = (query @ key.transpose(2, 3)) * kwargs["scaling"]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(FLASH, compute_flash)
AttentionMaskInterface.register(FLASH, flash_attention_mask)


def use_flash(model: Any) -> Any:
    """Set the emulated flash kernel in the LLM of a model, and return the model."""
    adapter: Any = find_adapter(model)
    for module in adapter.decoder.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = FLASH
    return model


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
@torch.no_grad()
def test_the_interface_of_flash_kernels(options: dict[str, Any]) -> None:
    family = deepen(FAMILIES[NAME], 6)
    inputs = load_inputs(NAME)
    with LargestStatesTwice()(load_model(NAME, 6)):
        expected = generate_logits(load_model(NAME, 6), inputs, **options)
    model = use_flash(family.model())
    with LargestStatesTwice()(model):
        tokens, logits = generate_logits(model, inputs, **options)
    assert torch.equal(tokens, expected[0])
    assert float((logits - expected[1]).abs().nan_to_num(0.0).max()) < 1e-4


@torch.no_grad()
def test_flash_kernels_with_a_window_shorter_than_the_prompt() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    inputs = load_inputs("ovis2")
    for window, is_refused in ((24, True), (4096, False)):
        settings = {"layer_types": types, "use_sliding_window": True, "sliding_window": window}
        model = use_flash(deepen(FAMILIES["ovis2"], 4, **settings).model())
        with LargestStates()(model):
            if is_refused:
                with pytest.raises(NotImplementedError, match=r"sliding window of 24 tokens.*sdpa"):
                    model(**inputs)
                with pytest.raises(NotImplementedError, match=r"sliding window of 24 tokens.*sdpa"):
                    model.generate(**inputs, max_new_tokens=2)
            else:
                model.generate(**inputs, max_new_tokens=2)


@torch.no_grad()
def test_chunked_prefill() -> None:
    model, inputs = load_model(NAME), load_inputs(NAME)
    with LargestStates()(model) as run:
        with pytest.raises(NotImplementedError, match="without prefill_chunk_size"):
            generate_logits(model, inputs, prefill_chunk_size=7)
        expected = generate_logits(model, inputs)
    assert len(run.cuts[0].selections) == 4
    with LargestStates(1.0)(model):
        pass_through = generate_logits(model, inputs)
    assert torch.equal(pass_through[1], generate_logits(model, inputs)[1])
    assert not torch.equal(pass_through[1], expected[1])


@pytest.mark.parametrize("layer", [0, 0.0, 1.0, -1])
def test_cuts_outside_the_llm(layer: Any) -> None:
    with pytest.raises(ValueError, match="is not inside an LLM"), LargestStates(layer=layer)(load_model(NAME)):
        pass


@pytest.mark.parametrize("layer", [2, 30])
def test_cuts_outside_a_small_llm(layer: Any) -> None:
    with (
        pytest.raises(ValueError, match="is not inside an LLM with 2 layers"),
        LargestStates(layer=layer)(load_model(NAME)),
    ):
        pass


def test_relative_cuts_in_one_layer_are_one_cut() -> None:
    assert resolve_cuts([Cut(0.25, 0.5), Cut(0.5, 0.25), Cut(0.75, 0.125)], 32) == {
        8: (0.25, 0.5),
        16: (0.5, 0.25),
        24: (0.75, 0.125),
    }
    assert resolve_cuts([Cut(0.1, 0.5), Cut(0.5, 0.25), Cut(0.9, 0.125)], 3) == {1: (0.1, 0.5), 2: (0.9, 0.125)}
    reducer = LargestStatesTwice(schedule=((0.2, 0.6), (0.4, 0.3)))
    with reducer(load_model(NAME)) as run:
        load_model(NAME)(**load_inputs(NAME))
    (cut,) = run.cuts
    assert cut.layer == 1
    assert [s.kept_tokens for s in cut.selections] == [int(0.3 * s.geometry.valid_tokens) for s in cut.selections]


def test_cuts_that_do_not_ascend() -> None:
    with pytest.raises(ValueError, match="ascend"):
        LargestStatesTwice(schedule=((3, 0.5), (2, 0.2)))
    with (
        pytest.raises(ValueError, match="ascend"),
        LargestStatesTwice(schedule=((3, 0.5), (0.5, 0.2)))(load_model(NAME, 6)),
    ):
        pass


def test_positions_with_the_geometry_of_the_image_are_not_counted() -> None:
    reducer = AtLayer(1, UniformStride(0.3), positions="reindex")
    with pytest.raises(ValueError, match=r'M-RoPE.*positions="preserve"'), reducer(load_model("qwen2_5_vl")):
        pass


def test_a_model_with_cross_attention() -> None:
    with (
        pytest.raises(NotImplementedError, match="cannot drop them there"),
        LargestStates()(families.FAMILIES["mllama"].model()),
    ):
        pass


@torch.no_grad()
def test_masks_of_a_kernel_and_packed_sequences() -> None:
    model, inputs = load_model(NAME), dict(load_inputs(NAME))
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(length, length).tril().bool().expand(4, 1, -1, -1)
    with LargestStates()(model):
        with pytest.raises(ValueError, match="2-D attention_mask"):
            model(**{**inputs, "attention_mask": mask})
        inputs.pop("attention_mask")
        positions = (torch.arange(length) % (length // 2)).expand(4, -1)
        with pytest.raises(ValueError, match="packed sequences"):
            model(**inputs, position_ids=positions)
    assert not find_adapter(model).decoder.layers[1]._forward_pre_hooks  # type: ignore[attr-defined]
