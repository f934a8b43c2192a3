"""Sliding windows that are shorter than the prompt; the first layer with full attention lies behind the cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.helpers.decoder import (
    LargestStates,
    LargestStatesTwice,
    combine,
    deepen,
    generate_logits,
    hide_dropped,
    load_inputs,
    visible_masks,
)
from tests.helpers.families import FAMILIES

SLIDING, FULL = "sliding_attention", "full_attention"
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3, alternating": ("gemma3", {"layer_types": [SLIDING, FULL] * 2}),
    "gemma3, full layer last": ("gemma3", {"layer_types": [SLIDING] * 3 + [FULL]}),
    "gemma3, full layer first": ("gemma3", {"layer_types": [FULL] + [SLIDING] * 3}),
    "qwen2, all sliding": ("ovis2", {"layer_types": [SLIDING] * 4, "use_sliding_window": True}),
    "qwen2, alternating": ("ovis2", {"layer_types": [SLIDING, FULL] * 2, "use_sliding_window": True}),
}
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@cache
def load_sliding(kind: str, window: int) -> Any:
    name, settings = SETTINGS[kind]
    return deepen(FAMILIES[name], 4, sliding_window=window, **settings).model()


@pytest.mark.parametrize("window", [16, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "way"), combine(5, list(SETTINGS), list(WAYS)))
@torch.no_grad()
def test_windows_count_the_positions_of_the_prompt(kind: str, way: str, window: int) -> None:
    model, inputs = load_sliding(kind, window), load_inputs(SETTINGS[kind][0])
    if way == "prompt lookup":
        family = FAMILIES[SETTINGS[kind][0]]
        inputs = family.batch(family.rows[1])
    assert window < inputs["input_ids"].shape[1]
    for reducer in (LargestStates(0.4), LargestStatesTwice(schedule=((1, 0.6), (3, 0.2)))):
        with reducer(model) as run:
            tokens, logits = generate_logits(model, inputs, **WAYS[way])
        with hide_dropped(model, visible_masks(model, inputs, run)):
            expected_tokens, expected = generate_logits(model, inputs, **WAYS[way])
        assert torch.equal(tokens, expected_tokens)
        assert float((logits - expected).abs().nan_to_num(0.0).max()) < 1e-5


@pytest.mark.parametrize("kind", SETTINGS)
@torch.no_grad()
def test_windows_matter(kind: str) -> None:
    """The windows are shorter than the distances in these prompts."""
    inputs = load_inputs(SETTINGS[kind][0])
    logits = [load_sliding(kind, window)(**inputs).logits for window in (16, 4096)]
    assert float((logits[0] - logits[1]).abs().max()) > 1e-2
