"""Narrow cache layers: operations on caches, copies, kinds of layers, and caches that outlive the block."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import StaticCache
from transformers import __version__ as transformers_version

from tests.helpers.decoder import (
    LargestStates,
    deepen,
    generate_logits,
    hide_dropped,
    load_inputs,
    load_model,
    visible_masks,
)
from tests.helpers.families import FAMILIES
from tokenprune.caches import find_cache
from tokenprune.decoder.narrow_cache import is_narrow

NAME = "llava_next"
WINDOW = 24


def load(kind: str) -> tuple[Any, Any]:
    """Return a model with full or sliding attention, and inputs of two rows of different lengths."""
    if kind == "sliding":
        types = ["sliding_attention", "full_attention"] * 2
        family = deepen(FAMILIES["gemma3"], 4, layer_types=types, sliding_window=WINDOW)
        return family.model(), family.batch(*family.rows[:2])
    family = FAMILIES[NAME]
    return load_model(NAME), family.batch(*family.rows[:2])


def make_cache(kind: str, model: Any) -> Any:
    """Return an empty static cache, or None for a dynamic cache that the model makes."""
    return StaticCache(config=model.config.get_text_config(), max_cache_len=160) if kind == "static" else None


def prefill(model: Any, inputs: Any, cache: Any = None) -> tuple[Any, Tensor]:
    """Return the cache and the next ids of a prefill."""
    past = {} if cache is None else {"past_key_values": cache}
    output = model(**inputs, use_cache=True, **past)
    return find_cache(output) if cache is None else cache, output.logits[:, -1:].argmax(-1)


def decode(model: Any, cache: Any, ids: Tensor, mask: Tensor, steps: int = 1) -> Tensor:
    """Return the logits of decode steps that continue with given ids, `[rows, steps, vocabulary]`."""
    logits = []
    for _ in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = (mask.cumsum(1) - 1)[:, -1:]
        logits.append(
            model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1:]
        )
    return torch.cat(logits, dim=1)


OPERATIONS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "nothing": (lambda cache: cache, [0, 1]),
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "deepcopy": (copy.deepcopy, [0, 1]),
    "pickle": (lambda cache: pickle.loads(pickle.dumps(cache)), [0, 1]),
}


@pytest.mark.parametrize("kind", ["full", "sliding", "static"])
@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_operations_on_rows(name: str, kind: str) -> None:
    """The cache after an operation continues as the rows of the oracle's cache."""
    operation, order = OPERATIONS[name]
    model, inputs = load(kind)
    with LargestStates(0.4)(model) as run:
        cache, ids = prefill(model, inputs, make_cache(kind, model))
        assert [is_narrow(layer) for layer in cache.layers] == [False] + [True] * (len(cache.layers) - 1)
        if not hasattr(cache.layers[0], name) and name.startswith("batch_"):
            pytest.skip("static layers of transformers have no such operation")
        changed = operation(cache)
        logits = decode(model, cache if changed is None else changed, ids[order], inputs["attention_mask"][order], 2)
    masks = [(layer, visible[order]) for layer, visible in visible_masks(model, inputs, run)]
    with hide_dropped(model, visible_masks(model, inputs, run)):
        cache, _ = prefill(model, inputs, make_cache(kind, model))
    changed = operation(cache)
    with hide_dropped(model, masks):
        expected = decode(model, cache if changed is None else changed, ids[order], inputs["attention_mask"][order], 2)
    assert float((logits - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["full", "sliding"])
@torch.no_grad()
def test_crop_removes_the_last_entries(kind: str) -> None:
    """After three steps, one of which is cropped, a step equals the third step without the crop."""
    model, inputs = load(kind)
    mask = inputs["attention_mask"]
    with LargestStates(0.4)(model):
        cache, ids = prefill(model, inputs)
        if kind == "sliding":
            for layer in cache.layers:
                if layer.is_sliding:
                    layer.activate_past_recording()
        first = decode(model, cache, ids, mask)
        length = cache.get_seq_length()
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [length] * len(cache.layers)
        cache.crop(-1)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [length - 1] * len(cache.layers)
        assert float((decode(model, cache, ids, mask) - first).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["full", "static"])
@torch.no_grad()
def test_reset_restores_the_class(kind: str) -> None:
    """The unmodified model reuses the cache after the block."""
    model, inputs = load(kind)
    cache, ids = prefill(model, inputs, make_cache(kind, model))
    expected = decode(model, cache, ids, inputs["attention_mask"])
    classes = [type(layer) for layer in cache.layers]
    with LargestStates(0.4)(model):
        cache, _ = prefill(model, inputs, make_cache(kind, model))
        decode(model, cache, ids, inputs["attention_mask"])
    assert [type(layer) for layer in cache.layers] != classes
    cache.reset()
    assert [type(layer) for layer in cache.layers] == classes
    cache, _ = prefill(model, inputs, cache)
    assert torch.equal(decode(model, cache, ids, inputs["attention_mask"]), expected)


@torch.no_grad()
def test_generate_with_a_static_cache_after_the_block() -> None:
    """`generate` keeps a static cache on the model and uses it again."""
    inputs = load_inputs(NAME)
    expected = generate_logits(FAMILIES[NAME].model(), inputs, cache_implementation="static")
    model = FAMILIES[NAME].model()
    for _ in range(2):
        with LargestStates(0.4)(model):
            reduced = generate_logits(model, inputs, cache_implementation="static")
        results = generate_logits(model, inputs, cache_implementation="static")
        assert not torch.equal(reduced[1], expected[1])
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@torch.no_grad()
def test_offloaded_caches_equal_dynamic_ones() -> None:
    model, inputs = load_model(NAME, 6), load_inputs(NAME)
    if not torch.cuda.is_available():
        pytest.skip("transformers offloads caches of accelerators only")
    with LargestStates(0.4)(model):
        expected = generate_logits(model, inputs)
        results = generate_logits(model, inputs, cache_implementation="offloaded")
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@torch.no_grad()
def test_quantized_caches_equal_the_layer_oracle(backend: str) -> None:
    if importlib.util.find_spec({"quanto": "optimum.quanto", "hqq": "hqq"}[backend].split(".")[0]) is None:
        pytest.skip(f"{backend} is not installed")
    model, inputs = load_model(NAME), load_inputs(NAME)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend, "residual_length": 1_000}}
    with LargestStates(0.4)(model) as run:
        results = generate_logits(model, inputs, **options)
    with hide_dropped(model, visible_masks(model, inputs, run)):
        expected = generate_logits(model, inputs, **options)
    assert torch.equal(results[0], expected[0])
    assert float((results[1] - expected[1]).abs().nan_to_num(0.0).max()) < 1e-5


@torch.no_grad()
def test_fp8_caches_quantize_what_remains() -> None:
    """The scale of FP8 depends on the stored keys, so the oracle has another one; the errors are of one size."""
    if Version(transformers_version) < Version("5.24"):
        pytest.skip("transformers has no FP8 cache before 5.24")
    model, inputs = load_model(NAME), load_inputs(NAME)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    errors = []
    for context in (nullcontext(), LargestStates(0.4)(model)):
        with context:
            _, expected = generate_logits(model, inputs)
            _, logits = generate_logits(model, inputs, **options)
        assert torch.equal(logits[0], expected[0])  # the prefill reads keys before quantization
        errors.append(float((logits[1] - expected[1]).abs().nan_to_num(0.0).max()))
    assert 0 < errors[1] < 3 * errors[0]


@torch.no_grad()
def test_layers_store_only_what_remains() -> None:
    model, inputs = load(NAME)
    with LargestStates(0.4)(model) as run:
        cache, _ = prefill(model, inputs)
    counts = run.account.tokens_per_layer
    ((_, visible),) = visible_masks(model, inputs, run)
    widths = [layer.keys.shape[-2] for layer in cache.layers]
    assert widths == [inputs["input_ids"].shape[1], int(visible.sum(1).max())]
    assert list(counts) == [int(inputs["attention_mask"].sum()), int(visible.sum())]
    assert all(layer.get_seq_length() == inputs["input_ids"].shape[1] for layer in cache.layers)
