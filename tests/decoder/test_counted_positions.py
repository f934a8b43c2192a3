"""Positions that are counted anew after the cuts, against rotary embeddings of counted positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.decoder import (
    LargestStates,
    LargestStatesTwice,
    generate_logits,
    hide_dropped,
    hook_layers,
    load_inputs,
    load_model,
    visible_masks,
)
from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.caches import find_cache

SLOW_NAMES = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "idefics3")]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@contextmanager
def count_positions(model: Any, masks: Sequence[tuple[int, Tensor]]) -> Iterator[None]:
    """Replace the position embeddings of each layer by those of the counted visible positions."""
    decoder: Any = find_adapter(model).decoder  # type: ignore[attr-defined]
    types = getattr(decoder.config, "layer_types", None)

    def enter(number: int, visible: Tensor, args: Any, kwargs: Any) -> Any:
        rows, queries = args[0].shape[:2]
        cache = find_cache(kwargs)
        past = 0 if cache is None or len(cache.layers) <= number else int(cache.layers[number].get_seq_length())
        visible = visible.repeat_interleave(rows // len(visible), dim=0)
        sequence = torch.nn.functional.pad(visible, (0, max(0, past + queries - visible.shape[1])), value=True)
        ids = (sequence.cumsum(1) - 1).clamp(min=0)[:, past : past + queries]
        options = {"layer_type": types[number]} if types else {}
        return args, {**kwargs, "position_embeddings": decoder.rotary_emb(args[0], ids, **options)}

    with hook_layers(decoder.layers, masks, enter):
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cuts", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llava_next", *SLOW_NAMES])
@torch.no_grad()
def test_generated_logits(name: str, cuts: int, way: str) -> None:
    family, model, inputs = FAMILIES[name], load_model(name, 6), load_inputs(name)
    if way == "prompt lookup":
        inputs = family.batch(family.rows[1])
    reducer = LargestStates(layer=2) if cuts == 1 else LargestStatesTwice()
    with replace(reducer, positions="reindex")(model) as run:
        tokens, logits = generate_logits(model, inputs, **WAYS[way])
    masks = visible_masks(model, inputs, run)
    with hide_dropped(model, masks):
        _, preserved = generate_logits(model, inputs, **WAYS[way])
        with count_positions(model, masks):
            expected_tokens, expected = generate_logits(model, inputs, **WAYS[way])
    assert torch.equal(tokens, expected_tokens)
    assert float((logits - expected).abs().nan_to_num(0.0).max()) < 1e-5
    assert float((logits - preserved).abs().nan_to_num(0.0).max()) > 1e-4


@pytest.mark.parametrize("name", ["llava_next", "gemma3"])
@torch.no_grad()
def test_forward(name: str) -> None:
    """With left padding and without position ids."""
    model, inputs = load_model(name, 6), load_inputs(name)
    with replace(LargestStatesTwice(), positions="reindex")(model) as run:
        logits = model(**inputs).logits
    masks = visible_masks(model, inputs, run)
    with hide_dropped(model, masks), count_positions(model, masks):
        expected = model(**inputs).logits
    assert float((logits - expected)[masks[-1][1]].abs().max()) < 1e-5
