"""Towers that run over all images as one sequence: signals come apart by images, under every kind of kernel."""

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
from tokenprune.models.qwen2_5_vl import nearest
from tokenprune.strategies import HiRED
from tokenprune.strategies.components.order import ScoreOrder
from tokenprune.testing.families.base import Family

KINDS = ("received_attention", "keys", "vision_features")
VARLEN = "tests_flash_varlen"


def varlen(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Attention of several sequences in one call, told apart by `cu_seq_lens_q`, as flash attention does it."""
    assert attention_mask is None
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    parts = zip(*(one.split(lengths, dim=2) for one in (query, key, value)), strict=True)
    found = [torch.nn.functional.scaled_dot_product_attention(*part, scale=kwargs["scaling"]) for part in parts]
    return torch.cat(found, dim=2).transpose(1, 2), None


AttentionInterface.register(VARLEN, varlen)


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "mistral3", "pixtral"])
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def use_varlen(model: Any) -> Any:
    """The model with the kernel above in its vision tower."""
    for module in find_adapter(model).tower.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = VARLEN
    return model


def encode(model: Any, inputs: Any) -> list[EncodedImage]:
    adapter = find_adapter(model)
    needs = [Signal(kind, layer) for kind in KINDS for layer in range(len(adapter.tower_layers))]
    return adapter.encode(inputs, needs).images


def equal(one: EncodedImage, two: EncodedImage) -> None:
    assert one.signals.keys() == two.signals.keys()
    for key, value in one.signals.items():
        assert value.shape[2 if value.dim() == 4 or key[0] == "received_attention" else 1] == one.geometry.tokens
        torch.testing.assert_close(value, two.signals[key], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_image_of_a_call_has_the_signals_that_it_has_alone(family: Family) -> None:
    """In every layer, with windows or without."""
    model = family.model()
    together = encode(model, family.batch([(112, 112)], [(60, 160), (150, 50)]))
    alone = [*encode(model, family.batch([(112, 112)])), *encode(model, family.batch([(60, 160), (150, 50)], first=1))]
    assert len(together) == len(alone) == 3
    for one, two in zip(together, alone, strict=True):
        equal(one, two)


@torch.no_grad()
def test_signals_do_not_depend_on_whether_the_kernel_takes_all_images_at_once(family: Family) -> None:
    inputs = family.batch([(112, 112)], [(60, 160), (150, 50)])
    apart, model = encode(family.model(), inputs), use_varlen(family.model())
    for one, two in zip(apart, encode(model, inputs), strict=True):
        equal(one, two)
    before = model(**inputs).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_attention_in_a_tower_with_windows_is_that_of_layers_without() -> None:
    """A row of attention over the whole image sums to one; and no layer is captured under another's number."""
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
def test_pixtral_needs_sizes_of_whole_tokens() -> None:
    model = FAMILIES["mistral3"].model()
    inputs = FAMILIES["mistral3"].batch([(112, 112)])
    odd = {**inputs, "image_sizes": torch.tensor([[112, 98]])}
    with pytest.raises(ValueError, match="no whole numbers of tokens of 28 pixels"), HiRED()(model):
        model(**odd)
    with pytest.raises(ValueError, match="needs image_sizes"), HiRED()(model):
        model(**{**inputs, "image_sizes": None})


def test_nearest_layer() -> None:
    assert [nearest(layer, [7, 15, 23, 31]) for layer in (0, 11, 30, 31)] == [7, 15, 31, 31]
    assert nearest(3, []) == 3


def test_a_sequence_comes_apart_where_the_kernel_was_told_to() -> None:
    tower, sequence = Tower([], segments=[4, 2]), torch.arange(6)[None, None, :, None]
    assert [one.shape[2] for one in tower.split_by_image(sequence, 2)] == [4, 2]
    assert [one.shape[2] for one in tower.split_by_image(sequence, 2, [2, 2, 2])] == [2, 2, 2]
    assert [one.shape[2] for one in tower.split_by_image(sequence[:, :, :4], 2)] == [4]


@torch.no_grad()
def test_every_level_of_qwen3_vl_holds_the_same_tokens_in_the_same_order() -> None:
    """An image of which nothing is left is left out of every level."""
    model, family = FAMILIES["qwen3_vl"].model(), FAMILIES["qwen3_vl"]
    inputs = family.batch([(112, 112), (28, 28)], [(60, 160)])
    whole = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    seen: list[Any] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["mm_encoder_outputs"]["image"]), with_kwargs=True
    )
    with HiRED(0.4, order=ScoreOrder())(model) as run:
        model(**inputs)
    hook.remove()
    assert [selection.kept_tokens for selection in run.selections] == [6, 0, 4]
    levels = [seen[0].pooler_output, *seen[0].deepstack_features]
    full = [whole.pooler_output, *whole.deepstack_features]
    assert len(levels) == 3
    for image, place in ((0, 0), (2, 1)):
        found = [
            [(row - every[image]).abs().sum(-1).argmin().item() for row in kept[place]]
            for kept, every in zip(levels, full, strict=True)
        ]
        assert found[0] == found[1] == found[2]
        assert found[0] != sorted(found[0])
        assert sorted(found[0]) == run.selections[image].kept[0].nonzero()[:, 0].tolist()
