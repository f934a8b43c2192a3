"""Signals of a timm tower, whose attention does not use the attention interface of transformers."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.families import FAMILIES
from tokenprune.image import Signal
from tokenprune.models.perception_lm import PerceptionLMAdapter

FAMILY = FAMILIES["perception_lm"]
KINDS = ("cls_attention", "cls_logits", "joint_attention", "received_attention", "keys", "vision_features")


@torch.no_grad()
def test_rows_equal_the_full_map() -> None:
    adapter = PerceptionLMAdapter(FAMILY.model())
    inputs = FAMILY.batch([(112, 112)], [(50, 200)])
    images = adapter.encode(inputs, [Signal(kind, 1) for kind in KINDS]).images
    maps: list[torch.Tensor] = []
    attention = adapter.tower_layers[1].attn
    attention.fused_attn = False  # so that the full map is the input of the dropout
    hook = attention.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    adapter.encode(inputs, ())
    hook.remove()
    for image, full in zip(images, maps[0].split(5), strict=True):
        patches = full[..., 1:]
        expected = {"cls_attention": patches[:, :, 0], "received_attention": patches.mean(dim=2)}
        for kind, row in expected.items():
            assert float(row.std()) > 1e-3
            pooled = row.unflatten(2, (2, 2, 2, 2)).sum(dim=(3, 5)).flatten(2)
            torch.testing.assert_close(image.read(Signal(kind, 1)), pooled)


@torch.no_grad()
def test_features_of_all_layers_equal_timm() -> None:
    adapter = PerceptionLMAdapter(FAMILY.model())
    inputs = FAMILY.batch([(112, 112)])
    _, hidden = adapter.tower.timm_model.forward_intermediates(inputs["pixel_values"][0], output_fmt="NLC", norm=False)
    for layer, expected in enumerate(hidden):
        features = adapter.encode(inputs, [Signal("vision_features", layer)]).images[0].vision_features(layer)
        pooled = expected.unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2)
        torch.testing.assert_close(features, pooled)


@torch.no_grad()
def test_no_hooks_remain_after_the_block() -> None:
    adapter = PerceptionLMAdapter(FAMILY.model())
    inputs = FAMILY.batch([(112, 112)])
    before = adapter.encode(inputs, ()).packed[0]
    assert torch.equal(adapter.encode(inputs, [Signal("cls_attention", 1)]).packed[0], before)
    assert not any(module._forward_pre_hooks for module in adapter.tower.modules())


def test_a_tower_with_unfused_attention_raises() -> None:
    adapter = PerceptionLMAdapter(FAMILY.model())
    adapter.tower_layers[1].attn.fused_attn = False
    with pytest.raises(ValueError, match="set fused_attn"):
        adapter.encode(FAMILY.batch([(112, 112)]), [Signal("cls_attention", 1)])
    assert not any(module._forward_pre_hooks for module in adapter.tower.modules())


def test_pooling_that_does_not_divide_the_tile_raises() -> None:
    model = FAMILY.model()
    model.config.projector_pooling_ratio = 3
    with pytest.raises(ValueError, match="cannot be pooled by 3"):
        _ = PerceptionLMAdapter(model).token_grid
