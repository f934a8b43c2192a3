"""Towers that encode all images as one sequence: signals are split by image, with all kinds of attention kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.image import EncodedImage, Signal
from tokenprune.models._capture.hooks import Tower
from tokenprune.models.qwen2_5_vl import nearest_layer
from tokenprune.strategies import HiRED
from tokenprune.strategies.components.order import ScoreOrder
from tokenprune.testing.families.base import Family

KINDS = ("received_attention", "keys", "vision_features")
VARLEN = "tests_flash_varlen"


def varlen(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Compute attention of several sequences in one call, separated by `cu_seq_lens_q` as in flash attention."""
    assert attention_mask is None
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [torch.nn.functional.scaled_dot_product_attention(*part, scale=kwargs["scaling"]) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(VARLEN, varlen)


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "mistral3", "pixtral"])
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def use_varlen(model: Any) -> Any:
    """Set the kernel `varlen` in the vision tower of a model and return the model."""
    for module in find_adapter(model).tower.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = VARLEN
    return model


def encode(model: Any, inputs: Any) -> list[EncodedImage]:
    adapter = find_adapter(model)
    needs = [Signal(kind, layer) for kind in KINDS for layer in range(len(adapter.tower_layers))]
    return adapter.encode(inputs, needs).images


def assert_equal_signals(actual: EncodedImage, expected: EncodedImage) -> None:
    """Assert that two encoded images have equal signals."""
    assert actual.signals.keys() == expected.signals.keys()
    for key, value in actual.signals.items():
        assert value.shape[2 if value.dim() == 4 or key[0] == "received_attention" else 1] == actual.geometry.tokens
        torch.testing.assert_close(value, expected.signals[key], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_signals_of_a_batch_equal_the_signals_of_separate_calls(family: Family) -> None:
    """In all layers, with and without window attention."""
    model = family.model()
    batch_images = encode(model, family.batch([(112, 112)], [(60, 160), (150, 50)]))
    rows = [family.batch([(112, 112)]), family.batch([(60, 160), (150, 50)], first=1)]
    separate_images = [image for row in rows for image in encode(model, row)]
    assert len(batch_images) == len(separate_images) == 3
    for batched, separate in zip(batch_images, separate_images, strict=True):
        assert_equal_signals(batched, separate)


@torch.no_grad()
def test_signals_do_not_depend_on_the_kind_of_kernel(family: Family) -> None:
    inputs = family.batch([(112, 112)], [(60, 160), (150, 50)])
    expected, model = encode(family.model(), inputs), use_varlen(family.model())
    for image, expected_image in zip(encode(model, inputs), expected, strict=True):
        assert_equal_signals(image, expected_image)
    before = model(**inputs).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_attention_in_a_tower_with_windows_is_read_from_layers_without_windows() -> None:
    """Attention rows over the whole image sum to 1, and each layer is captured under its own number."""
    model = FAMILIES["qwen2_5_vl"].model()
    assert model.model.visual.fullatt_block_indexes == [0, 2]
    image = encode(model, FAMILIES["qwen2_5_vl"].batch([(112, 112)]))[0]
    rows = [image.read(Signal("received_attention", layer)) for layer in range(4)]
    torch.testing.assert_close(rows[0].sum(-1), torch.ones_like(rows[0].sum(-1)))
    assert torch.equal(rows[1], rows[2])
    assert torch.equal(rows[3], rows[2])
    assert not torch.equal(rows[0], rows[2])
    keys = [image.read(Signal("keys", layer)) for layer in range(4)]
    assert all(not torch.equal(keys[2], keys[layer]) for layer in (0, 1, 3))


@torch.no_grad()
def test_pixtral_requires_sizes_of_whole_tokens() -> None:
    model = FAMILIES["mistral3"].model()
    inputs = FAMILIES["mistral3"].batch([(112, 112)])
    wrong_size = {**inputs, "image_sizes": torch.tensor([[112, 98]])}
    with pytest.raises(ValueError, match="no whole numbers of tokens of 28 pixels"), HiRED()(model):
        model(**wrong_size)
    with pytest.raises(ValueError, match="needs image_sizes"), HiRED()(model):
        model(**{**inputs, "image_sizes": None})


def test_nearest_layer() -> None:
    assert [nearest_layer(layer, [7, 15, 23, 31]) for layer in (0, 11, 30, 31)] == [7, 15, 31, 31]
    assert nearest_layer(3, []) == 3


def test_a_sequence_is_split_at_the_lengths_of_the_kernel() -> None:
    tower, sequence = Tower([], segments=[4, 2]), torch.arange(6)[None, None, :, None]
    assert [part.shape[2] for part in tower.split_by_image(sequence, 2)] == [4, 2]
    assert [part.shape[2] for part in tower.split_by_image(sequence, 2, [2, 2, 2])] == [2, 2, 2]
    assert [part.shape[2] for part in tower.split_by_image(sequence[:, :, :4], 2)] == [4]


@torch.no_grad()
def test_all_levels_of_qwen3_vl_have_the_same_tokens_in_the_same_order() -> None:
    """An image without kept tokens is omitted from all levels."""
    model, family = FAMILIES["qwen3_vl"].model(), FAMILIES["qwen3_vl"]
    inputs = family.batch([(112, 112), (28, 28)], [(60, 160)])
    complete = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    outputs: list[Any] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: outputs.append(kwargs["mm_encoder_outputs"]["image"]), with_kwargs=True
    )
    with HiRED(0.4, order=ScoreOrder())(model) as run:
        model(**inputs)
    hook.remove()
    assert [selection.kept_tokens for selection in run.selections] == [6, 0, 4]
    levels = [outputs[0].pooler_output, *outputs[0].deepstack_features]
    full_levels = [complete.pooler_output, *complete.deepstack_features]
    assert len(levels) == 3
    for image, position in ((0, 0), (2, 1)):
        matches = [
            [(row - all_tokens[image]).abs().sum(-1).argmin().item() for row in kept[position]]
            for kept, all_tokens in zip(levels, full_levels, strict=True)
        ]
        assert matches[0] == matches[1] == matches[2]
        assert matches[0] != sorted(matches[0])
        assert sorted(matches[0]) == run.selections[image].kept[0].nonzero()[:, 0].tolist()
