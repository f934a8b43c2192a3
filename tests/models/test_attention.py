"""Captured attention rows against the full attention map of an eager tower."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.image import Signal
from tokenprune.models._capture.attention import cls_rows, received_attention
from tokenprune.models._capture.hooks import Tower, capture_signals
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.testing import tiny_models as tiny

KINDS = ("cls_attention", "received_attention", "keys", "vision_features")


def full_map(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (query.double() @ key.double().transpose(-1, -2) * scaling).softmax(-1)


@settings(max_examples=30, deadline=None)
@given(
    tiles=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    length=st.integers(2, 20),
    prefix=st.integers(0, 1),
    chunk=st.integers(1, 25),
    seed=st.integers(0, 99),
)
def test_rows_and_columns_of_the_full_map(tiles, key_heads, groups, length, prefix, chunk, seed) -> None:
    """Also with grouped heads: query head h reads key head h // groups, as in `repeat_kv` of transformers."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(tiles, key_heads * groups, length, 4, generator=generator) * 3
    key = torch.randn(tiles, key_heads, length, 4, generator=generator)
    attention = full_map(query, key, 0.7)
    torch.testing.assert_close(cls_rows(query, key, 0.7), attention[:, :, 0, 1:].float(), atol=1e-5, rtol=1e-4)
    columns = attention.mean(dim=2)[:, :, prefix:].float()
    torch.testing.assert_close(received_attention(query, key, 0.7, prefix, chunk=chunk), columns, atol=1e-5, rtol=1e-4)


def test_half_precision_rows_are_returned_in_float32() -> None:
    query, key = torch.randn(1, 2, 6, 4).bfloat16(), torch.randn(1, 2, 6, 4).bfloat16()
    for rows in (cls_rows(query, key, 0.5), received_attention(query, key, 0.5, 1)):
        assert rows.dtype == torch.float32
        assert rows.shape == (1, 2, 5)


def all_signals(layers: int = 4) -> list[Signal]:
    """Return the signals of all kinds and layers."""
    return [Signal(kind, layer) for kind in KINDS for layer in range(layers)]


def build_adapter(family: str, model: Any) -> Any:
    return {"llava_next": LlavaNextAdapter, "llava": LlavaAdapter}[family](model)


def store_output(outputs: dict[int, torch.Tensor], index: int, module: Any, args: Any, output: torch.Tensor) -> None:
    """Store the output of a module; a forward hook."""
    outputs[index] = output


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava_next", "llava"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_captured_signals_equal_the_eager_tower(family: str, attn: str, tower: str) -> None:
    prefix = int(tower == "clip")
    inputs = tiny.batch(family, [(200, 300), (60, 170)], [(100, 41)], tower=tower)
    model = tiny.tiny_model(family, attn, tower=tower)
    needs = [need for need in all_signals() if need.kind != "cls_attention" or prefix]
    with torch.no_grad():
        images = build_adapter(family, model).encode(inputs, needs).images
        eager: Any = tiny.tiny_model(family, "eager", tower=tower).model.vision_tower
        for number, image in enumerate(images):
            pixels = inputs["pixel_values"][number]
            pixels = pixels[: image.geometry.tiles] if family == "llava_next" else pixels[None]
            projected: dict[int, torch.Tensor] = {}
            hooks = [
                layer.self_attn.k_proj.register_forward_hook(partial(store_output, projected, index))
                for index, layer in enumerate(eager.encoder.layers)
            ]
            out = eager(pixels, output_attentions=True)
            for hook in hooks:
                hook.remove()
            same_kernel = model.model.vision_tower(pixels, output_hidden_states=True)
            for layer in range(4):
                attention = out.attentions[layer]
                tolerances = {"atol": 1e-4, "rtol": 1e-3}
                if prefix:
                    torch.testing.assert_close(image.cls_attention(layer), attention[:, :, 0, 1:], **tolerances)
                columns = attention.mean(dim=2)[:, :, prefix:]
                torch.testing.assert_close(image.received_attention(layer), columns, **tolerances)
                keys = projected[layer].unflatten(-1, (4, -1)).transpose(1, 2)[:, :, prefix:]
                torch.testing.assert_close(image.keys(layer), keys, **tolerances)
                hidden = same_kernel.hidden_states[layer + 1][:, prefix:]
                torch.testing.assert_close(image.vision_features(layer), hidden, **tolerances)


def test_attention_rows_of_the_tiny_models_are_far_from_uniform() -> None:
    """If rows were uniform, the comparison above could not distinguish them."""
    model = tiny.tiny_model("llava")
    image = LlavaAdapter(model).encode(tiny.batch("llava", [(80, 90)]), all_signals()).images[0]
    rows = image.cls_attention("first")
    assert float((rows.max(-1).values / rows.mean(-1)).mean()) > 2


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava_next", "llava"])
def test_cls_logits_are_attention_before_the_softmax(family: str, attn: str) -> None:
    """The logits are compared up to a constant per row, which does not change the softmax."""
    model = tiny.tiny_model(family, attn)
    inputs = tiny.batch(family, [(112, 112)])
    needs = [Signal(kind, layer) for kind in ("cls_logits", "cls_attention") for layer in (0, -1)]
    with torch.no_grad():
        image = build_adapter(family, model).encode(inputs, needs).images[0]
    for layer in (0, -1):
        constant = image.cls_attention(layer).clamp(min=1e-30).log() - image.cls_logits(layer)
        large = image.cls_attention(layer) > 1e-6
        spread = (constant - constant.masked_fill(~large, torch.nan).nanmean(-1, keepdim=True))[large]
        assert spread.abs().max() < 1e-3
        assert image.cls_logits(layer).std() > 0.5


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava_next", "llava"])
def test_capturing_does_not_change_the_features(family: str, attn: str) -> None:
    """The features are bit-identical, because the attention kernel of the user runs."""
    inputs = tiny.batch(family, [(200, 300)], [(100, 41)])
    model = tiny.tiny_model(family, attn)
    adapter = build_adapter(family, model)
    arguments = {name: inputs[name] for name in adapter.image_inputs if name in inputs}
    with torch.no_grad():
        plain = model.model.get_image_features(**arguments, return_dict=True).pooler_output
        captured = adapter.encode(inputs, all_signals()).packed
    assert len(plain) == len(captured) == 2
    assert all(torch.equal(left, right) for left, right in zip(plain, captured, strict=True))


def tower_state(tower: Any) -> list[tuple[Any, ...]]:
    return [
        (layer.self_attn.config, layer.self_attn.config._attn_implementation, len(layer._forward_hooks))
        for layer in tower.encoder.layers
    ]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_tower_is_restored_after_a_block_and_after_an_exception(attn: str) -> None:
    model = tiny.tiny_model("llava", attn)
    tower, adapter = model.model.vision_tower, LlavaAdapter(model)
    inputs = tiny.batch("llava", [(80, 90)])
    model.model.get_image_features(inputs["pixel_values"])  # transformers installs its own hooks at the first call
    before = tower_state(tower)
    adapter.encode(inputs, all_signals())

    def is_unchanged() -> bool:
        return all(
            old[0] is new[0] and old[1:] == new[1:] for old, new in zip(before, tower_state(tower), strict=True)
        ) and not any("tokenprune" in name for name in vars(before[0][0]))

    assert is_unchanged()
    kinds = {index: set(KINDS) for index in range(4)}
    with capture_signals(Tower(tower.encoder.layers, cls="first"), kinds):
        inside = tower_state(tower)
        assert not is_unchanged()
        assert all(old[0] is not new[0] for old, new in zip(before, inside, strict=True))
        assert tower.config._attn_implementation == attn  # the tower builds masks from its own config
    assert is_unchanged()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no projector today")

    model.model.multi_modal_projector.forward = fail
    with pytest.raises(RuntimeError, match="no projector today"):
        adapter.encode(inputs, all_signals())
    assert is_unchanged()
    tower.encoder.layers[2].mlp.forward = fail
    with pytest.raises(RuntimeError, match="no projector today"):
        adapter.encode(inputs, all_signals())
    assert is_unchanged()


def test_only_requested_layers_are_changed_and_captured() -> None:
    model = tiny.tiny_model("llava")
    layers = model.model.vision_tower.encoder.layers
    with capture_signals(Tower(layers, cls="first"), {1: {"keys"}, 2: {"vision_features"}}) as captured:
        config = model.model.vision_tower.config
        changed = [layer.self_attn.config is not config for layer in layers]
        assert changed == [False, True, False, False]
        model.model.vision_tower(torch.randn(2, 3, 56, 56))
        assert set(captured) == {("keys", 1), ("vision_features", 2)}
        model.model.vision_tower(torch.randn(3, 3, 56, 56))
    assert [len(keys) for keys in captured["keys", 1]] == [2, 3]  # a second run adds tiles
    assert torch.cat(captured["keys", 1]).shape == (5, 4, 16, 8)
    assert not any(value.requires_grad for values in captured.values() for value in values)


def test_signals_of_unknown_layers_raise_before_the_tower_runs() -> None:
    adapter = LlavaAdapter(tiny.tiny_model("llava"))
    with pytest.raises(ValueError, match="is no layer of a vision tower with 4 layers"):
        adapter.encode(tiny.batch("llava", [(80, 90)]), [Signal("keys", 4)])


def test_a_tower_without_cls_provides_no_cls_attention() -> None:
    assert "cls_attention" in LlavaAdapter(tiny.tiny_model("llava")).provides
    assert "cls_attention" not in LlavaAdapter(tiny.tiny_model("llava", tower="siglip")).provides


@pytest.mark.parametrize("family", ["llava_next", "llava"])
def test_features_belong_to_their_tiles_and_tokens(family: str) -> None:
    """Features equal the projected output of the feature layer, and are zero where the model unpads."""
    model = tiny.tiny_model(family)
    inputs = tiny.batch(family, [(20, 100), (100, 41)], [(112, 112)])
    with torch.no_grad():
        encoding = build_adapter(family, model).encode(inputs, [Signal("vision_features", "feature")])
        for image in encoding.images:
            projected = model.model.multi_modal_projector(image.vision_features("feature"))
            valid = image.geometry.valid[..., None]
            torch.testing.assert_close(image.features, projected * valid, atol=1e-5, rtol=1e-4)
    assert not all(bool(image.geometry.valid.all()) for image in encoding.images) or family == "llava"


@pytest.mark.parametrize("family", ["llava_next", "llava"])
def test_pooling_attention_equals_the_head_of_siglip(family: str) -> None:
    """The reference is the attention weights that the head returns for the output of the tower."""
    model = tiny.tiny_model(family, tower="siglip")
    adapter, inputs = build_adapter(family, model), tiny.batch(family, [(200, 300), (60, 170)], tower="siglip")
    with torch.no_grad():
        model.model.vision_tower.head.attention.in_proj_weight.mul_(8)  # far from uniform
        encoding = adapter.encode(inputs, [Signal("pooling_attention", ["first", "feature"])])
        for number, image in enumerate(encoding.images):
            pixels = inputs["pixel_values"][number]
            pixels = pixels[: image.geometry.tiles] if family == "llava_next" else pixels[None]
            tower = model.model.vision_tower
            hidden, head = tower(pixels).last_hidden_state, tower.head
            probe_token = head.probe.repeat(len(pixels), 1, 1)
            maps = head.attention(probe_token, hidden, hidden, need_weights=True, average_attn_weights=False)[1]
            weights = maps[:, :, 0]
            for layer in ("first", "feature"):
                torch.testing.assert_close(image.pooling_attention(layer), weights)
            assert weights.amax() > 3 * weights.mean()
    plain = model.model.get_image_features(
        **{name: inputs[name] for name in adapter.image_inputs if name in inputs}, return_dict=True
    ).pooler_output
    assert all(torch.equal(left, right) for left, right in zip(plain, encoding.packed, strict=True))


def test_the_hooks_of_the_pooling_head_are_removed_after_an_exception() -> None:
    model = tiny.tiny_model("llava", tower="siglip")
    head = model.model.vision_tower.head

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no head today")

    head.mlp.forward = fail
    inputs = tiny.batch("llava", [(80, 90)], tower="siglip")
    with pytest.raises(RuntimeError, match="no head today"):
        LlavaAdapter(model).encode(inputs, [Signal("pooling_attention")])
    assert not head.attention._forward_hooks
    assert not head.attention._forward_pre_hooks


def test_only_a_tower_with_a_pooling_head_provides_its_attention() -> None:
    model = tiny.tiny_model("llava", tower="siglip")
    assert "pooling_attention" in LlavaAdapter(model).provides
    del model.model.vision_tower.head
    model.model.vision_tower.use_head = False
    assert "pooling_attention" not in LlavaAdapter(model).provides
    assert "pooling_attention" not in LlavaAdapter(tiny.tiny_model("llava")).provides
