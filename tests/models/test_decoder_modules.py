"""Every family except Llama 3.2 Vision gives access to the layers of its LLM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.capabilities import DecoderModules, HasDecoder, require_capability
from tokenprune.image import LLM_SIGNALS, Signal
from tokenprune.reducer import ScoreReducer
from tokenprune.requirements import describe_missing_signals, list_missing_signals
from tokenprune.stages import DecoderStage
from tokenprune.testing import families
from tokenprune.testing.tiny_models import tiny_model

ADDED = {"qwen3_vl": 3, "granite4_vision": 6}
"""Number of first layers whose inputs receive features by position; 0 in all other families."""
CONVOLUTIONS = {"lfm2_vl": (0,)}
"""Layers without attention."""


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_are_those_that_the_llm_runs(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    adapter: Any = find_adapter(model)
    assert adapter.provides >= LLM_SIGNALS
    modules = require_capability(adapter, HasDecoder).decoder_modules
    assert modules.adds_features_until == ADDED.get(name, 0)
    without = CONVOLUTIONS.get(name, ())
    assert modules.attention_layers == tuple(i for i in range(len(modules.layers)) if i not in without)
    if not family.adapter.supports_transformers():
        pytest.skip("the unmodified model raises in the installed transformers")
    order: list[str] = []
    names = {"decoder": modules.decoder, "rotary": modules.rotary, "norm": modules.norm}
    named = {f"layer {i}": layer for i, layer in enumerate(modules.layers)}
    named |= {f"mlp {i}": getattr(layer, modules.mlp) for i, layer in enumerate(modules.layers)}
    named |= {f"attention {i}": getattr(modules.layers[i], modules.attention) for i in modules.attention_layers}
    for label, module in {**names, **named}.items():
        assert isinstance(module, nn.Module), label
        module.register_forward_pre_hook(lambda *_, label=label: order.append(label))
    with torch.no_grad():
        model(**family.batch([family.sizes[0]]))
    expected = []
    for i in range(len(modules.layers)):
        expected += [f"layer {i}", *([f"attention {i}"] if i in modules.attention_layers else []), f"mlp {i}"]
    assert [label for label in order if label != "rotary"] == ["decoder", *expected, "norm"]
    assert "rotary" in order
    assert order.index("rotary") < order.index("layer 0")


def test_cross_attention_has_no_cuts() -> None:
    adapter: Any = find_adapter(families.FAMILIES["mllama"].model())
    assert not adapter.provides & LLM_SIGNALS
    with pytest.raises(TypeError, match=r"MllamaAdapter has no capability HasDecoder"):
        require_capability(adapter, HasDecoder)


def test_the_layer_before_a_cut_has_attention() -> None:
    modules: DecoderModules = find_adapter(FAMILIES["lfm2_vl"].model()).decoder_modules  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no layer before layer 1 of the LLM has attention"):
        modules.layer_before(1)
    layers = [modules.layers[index] for index in (0, 1, 0, 0)]
    assert replace(modules, layers=layers).layer_before(4) == 1


class LastAttention(ScoreReducer):
    """Reads a signal of the LLM."""

    @property
    def needs(self) -> list[Signal]:
        return [Signal("last_text_attention", "before")]

    def score(self, image: Any) -> Tensor:
        return torch.as_tensor(image.last_text_attention().mean(dim=1))


def test_strategies_before_the_llm_read_no_signals_of_the_llm() -> None:
    class InsideLast(LastAttention):
        stage = DecoderStage()

    adapter = find_adapter(tiny_model("llava"))
    assert list_missing_signals(LastAttention(), adapter) == ["last_text_attention"]
    message = describe_missing_signals(LastAttention(), adapter)
    assert message is not None
    assert "llm_keys" not in message
    assert list_missing_signals(InsideLast(), adapter) == []
