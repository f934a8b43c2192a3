"""Traced layers of the LLM against the eager kernel's own weights, and against hooks and formulas written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.helpers.oracle import collect_state, generate
from tokenprune.adapter import find_adapter
from tokenprune.capabilities import DecoderModules
from tokenprune.decoder.trace import LayerTrace
from tokenprune.decoder.views import ImagePositions, read_signal, unpack_signals
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.testing.families.base import Family

TRACED = frozenset({"last_text_attention", "llm_hidden", "token_transition"})
TOLERANCES = {"eager": 1.2e-7, "sdpa": 1e-5}
"""Largest difference of the last row to the eager map. All rows together differ by twice as much under "sdpa", because
its rounding in the tower and in earlier layers reaches the queries."""


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    model = family.model()
    with torch.no_grad():
        model(**family.batch([family.sizes[0]]))  # transformers installs its own capturing hooks at the first call
    return model


@pytest.fixture(scope="module")
def inputs(family: Family) -> Any:
    return family.batch(*family.rows)


def locate_images(model: Any, inputs: Any) -> tuple[list[ImagePositions], list[TileGeometry], Tensor, Tensor]:
    """Return positions and layout of each image, the last position of each row, and the mask of real positions."""
    adapter = find_adapter(model)
    placeholders, real = inputs["input_ids"] == adapter.image_token_id, inputs["attention_mask"].bool()
    layouts, images, start = adapter.layouts(inputs), [], 0
    spots = placeholders.nonzero()
    for layout in layouts:
        rows, positions = spots[start : start + len(layout.packed)].unbind(1)
        start += len(layout.packed)
        row = int(rows[0])
        later = torch.arange(real.shape[1]) > int(positions[-1])
        text = (later & real[row] & ~placeholders[row]).nonzero()[:, 0]
        images.append(ImagePositions(row, positions[layout.packed != NEWLINE], text))
    assert start == len(spots)
    last = torch.tensor([int(row.nonzero()[-1]) for row in real])
    return images, layouts, last, real


@contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def run_eager(model: Any, inputs: Any, modules: DecoderModules) -> dict[int, Tensor]:
    """Return the attention map of each layer that the eager kernel computes, `[rows, heads, length, length]`."""
    maps: dict[int, Tensor] = {}
    handles = [
        getattr(modules.layers[index], modules.attention).register_forward_hook(
            lambda module, args, output, index=index: maps.update({index: output[1]})
        )
        for index in modules.attention_layers
    ]
    with attention_implementation(model, "eager"):
        model(**inputs)
    for handle in handles:
        handle.remove()
    return maps


@torch.no_grad()
def trace(model: Any, inputs: Any, kinds: Mapping[int, frozenset[str]]) -> dict[int, LayerTrace]:
    store: dict[int, LayerTrace] = {}
    tracer = find_adapter(model).trace_layers(kinds)  # type: ignore[attr-defined]
    with tracer.hold(), tracer.record_into(store):
        model(**inputs)
    return store


@torch.no_grad()
def ask(model: Any, inputs: Any, index: int, rotated: bool = True) -> LayerTrace:
    """Return what a layer answers in its own pre-hook during a call with a cache."""
    adapter: Any = find_adapter(model)
    answers: list[LayerTrace] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        answers.append(adapter.ask_layer(index, args, kwargs, rotated))

    handle = adapter.decoder_modules.layers[index].register_forward_pre_hook(hook, with_kwargs=True)
    model(**inputs, use_cache=True)
    handle.remove()
    return answers[0]


@pytest.mark.parametrize("kernel", TOLERANCES)
def test_attention_equals_the_eager_map(family: Family, model: Any, inputs: Any, kernel: str) -> None:
    modules: DecoderModules = find_adapter(model).decoder_modules  # type: ignore[attr-defined]
    images, layouts, last, _ = locate_images(model, inputs)
    maps = run_eager(model, inputs, modules)
    kinds = frozenset({"last_text_attention", "llm_keys"})
    with attention_implementation(model, kernel):
        traces = trace(model, inputs, dict.fromkeys(modules.attention_layers, kinds))
        asked = {index: ask(model, inputs, index) for index in modules.attention_layers}
    assert traces.keys() == maps.keys()
    close = {"rtol": 0.0, "atol": TOLERANCES[kernel]}
    all_close = {"rtol": 0.0, "atol": TOLERANCES[kernel] * (1 + (kernel == "sdpa"))}
    for index, full in maps.items():
        for asks, layer in ((False, traces[index]), (True, asked[index])):
            prefix = "asked_" if asks else ""
            read = {name: read_signal(f"{prefix}{name}_attention", layer, images, last) for name in ("text", "visual")}
            read["last"] = read_signal(f"{prefix}last{'' if asks else '_text'}_attention", layer, images, last)
            for number, image in enumerate(images):
                columns = full[image.row][..., image.entries]
                torch.testing.assert_close(read["last"][number], columns[:, last[image.row]], **close)
                torch.testing.assert_close(read["text"][number], columns[:, image.text], **all_close)
                torch.testing.assert_close(read["visual"][number], columns[:, image.entries].mean(dim=1), **all_close)
                shifted = columns.roll(1, dims=-1)  # large enough that a wrong column fails
                assert (columns - shifted).abs().max() > 10 * all_close["atol"]
        assert torch.equal(traces[index].query, asked[index].query)
        assert torch.equal(traces[index].key, asked[index].key)
    tiles = unpack_signals("last_text_attention", read["last"], layouts)
    for value, layout, packed in zip(tiles, layouts, read["last"], strict=True):
        assert value.shape == (layout.tiles, packed.shape[0], layout.tokens)
        order = layout.packed[layout.packed != NEWLINE]
        assert torch.equal(value.transpose(0, 1).flatten(1)[:, order], packed)
        assert value.count_nonzero() <= packed.numel()


@torch.no_grad()
def test_hidden_states_keys_and_transitions_equal_hooks(family: Family, model: Any, inputs: Any) -> None:
    modules: DecoderModules = find_adapter(model).decoder_modules  # type: ignore[attr-defined]
    images, _, last, real = locate_images(model, inputs)
    index = modules.attention_layers[-1]
    layer, seen = modules.layers[index], {}

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]).clone(), output

        return hook

    attention = getattr(layer, modules.attention)
    named = {"layer": layer, "attention": attention, "mlp": getattr(layer, modules.mlp)}
    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in named.items()]
    cache = DynamicCache(config=model.config.get_text_config())
    model(**inputs, past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    traced = trace(model, inputs, {index: TRACED | {"llm_keys", "text_keys"}})[index]
    keys = cache.layers[attention.layer_idx].keys
    total = torch.zeros(real.shape)
    for name in ("attention", "mlp"):
        before, after = seen[name]
        after = (after[0] if isinstance(after, tuple) else after).view_as(before)
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        total += after.norm(dim=-1) / before.norm(dim=-1) * (1 - cosine).masked_fill(~real, -torch.inf).softmax(dim=1)
    for kind, expected in (("llm_hidden", seen["layer"][0]), ("token_transition", total[..., None])):
        for image, value in zip(images, read_signal(kind, traced, images, last, real), strict=True):
            torch.testing.assert_close(value, expected[image.row, image.entries], rtol=1e-5, atol=1e-6)
    if keys.shape[2] == real.shape[1]:  # a sliding cache stores the last keys only
        for kind in ("llm_keys", "asked_keys"):
            for image, value in zip(images, read_signal(kind, traced, images, last), strict=True):
                assert torch.equal(value, keys[image.row][:, image.entries])
        for image, value in zip(images, read_signal("text_keys", traced, images, last), strict=True):
            assert torch.equal(value, keys[image.row][:, image.text])
    for image, value in zip(images, read_signal("text_hidden", traced, images, last), strict=True):
        assert torch.equal(value, seen["layer"][0][image.row, image.text])


@torch.no_grad()
def test_nothing_is_left_behind(family: Family, model: Any, inputs: Any) -> None:
    adapter: Any = find_adapter(model)
    index = adapter.decoder_modules.attention_layers[-1]
    expected, store = generate(model, inputs), dict[int, LayerTrace]()
    before = collect_state(model)
    tracer = adapter.trace_layers({index: TRACED})
    with tracer.hold():
        with tracer.record_into(store):
            assert torch.equal(generate(model, inputs), expected)
        assert store[index].hidden.shape[1] == inputs["input_ids"].shape[1]  # of the prefill, not of a decode step
        assert collect_state(model) != before
    assert collect_state(model) == before
    mlp = getattr(adapter.decoder_modules.layers[index], adapter.decoder_modules.mlp)
    for error in (ZeroDivisionError, KeyboardInterrupt):

        def fail(*_: Any, error: type[BaseException] = error) -> None:
            raise error

        handle, store = mlp.register_forward_pre_hook(fail), {}
        with tracer.hold():
            with pytest.raises(error), tracer.record_into(store):
                model(**inputs)
            handle.remove()
            assert not store
            with tracer.record_into(store):
                model(**inputs)
            assert store.keys() == {index}
        assert collect_state(model) == before
