"""In all families, layers after the feature layer and unused pooling heads do not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.families import FAMILIES
from tests.helpers.truncation import count_calls, prepare_both
from tokenprune.adapter import adapters, find_adapter
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._capture.signals import list_captured_signals
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.models.mllama import MllamaAdapter
from tokenprune.pipeline import Pipeline
from tokenprune.strategies import FasterVLM, HiRED
from tokenprune.testing.examples import build_example, find_example
from tokenprune.testing.tiny_models import batch, tiny_model

RUNNABLE = [name for name, family in FAMILIES.items() if family.adapter.supports_transformers()]
"""Rows of the test matrix whose models run in the installed transformers."""
BY_ARGUMENT = {
    "aya_vision",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "pixtral",
    "vipllava",
}
"""Families whose `forward` takes `vision_feature_layer`."""


def family_call(name: str) -> tuple[PlaceholderAdapter, dict[str, Any]]:
    """Return a family's tiny model, bound to its adapter, and the inputs of a call with one image."""
    if name == "mllama":  # not in the matrix, because its images are not in the prompt
        adapter = build_example(MllamaAdapter).adapter
        return adapter, find_example(type(adapter))(adapter).build_inputs([[(112, 112)]])
    adapter = find_adapter(FAMILIES[name].model())
    assert isinstance(adapter, PlaceholderAdapter)
    return adapter, dict(FAMILIES[name].batch([FAMILIES[name].sizes[0]]))


def use_inner_layer(adapter: PlaceholderAdapter) -> bool:
    """Set an inner layer as the feature layer of a model; return False if its family supports only the last layer."""
    config = adapter.model.config
    if hasattr(config, "deepstack_layer_map"):  # Granite 4 Vision
        config.deepstack_layer_map, config.spatial_vision_layer = [(0, 0), (1, 1)], 2
    elif hasattr(config, "vision_feature_layer"):
        layers = config.vision_feature_layer
        config.vision_feature_layer = 2 if isinstance(layers, int) else ([1, 2] * len(layers))[-len(layers) :]
    elif adapter.family == "phi4_multimodal":
        adapter.embedder.layer_idx = 2
    else:
        return False
    return True


def test_all_families_are_tested() -> None:
    tested = {type(family_call(name)[0]) for name in [*RUNNABLE, "mllama"]}
    assert tested == {kind for kind in adapters().values() if kind.supports_transformers()}


@pytest.mark.parametrize(
    ("name", "by_argument"),
    [*((name, False) for name in [*RUNNABLE, "mllama"]), *((name, True) for name in sorted(BY_ARGUMENT))],
)
def test_layers_after_the_feature_layer_do_not_run(name: str, by_argument: bool) -> None:
    """In all families, also if the code of the model projects tokens; the logits do not change."""
    adapter, inputs = family_call(name)
    model, depth = adapter.model, len(adapter.tower_layers)
    if by_argument:
        default = model.config.vision_feature_layer
        inputs["vision_feature_layer"] = 2 if isinstance(default, int) else [1, 2]
    is_inner = by_argument or use_inner_layer(adapter)
    last = adapter.feature_layer(inputs)
    assert last == (1 if is_inner else depth - 1)
    modules = {f"{index}": next(layer.children()) for index, layer in enumerate(adapter.tower_layers)}
    reducer = FasterVLM(0.3)
    needed = max([last, *list_captured_signals(Pipeline(reducer, adapter).needs, len(adapter.tower_layers), last)])
    assert needed == last
    with torch.no_grad(), count_calls(modules) as runs, reducer(model):
        model(**inputs)
    assert [runs[str(index)] > 0 for index in range(depth)] == [index <= last for index in range(depth)]
    logits = []
    complete, truncated = prepare_both(adapter, reducer, inputs, for_generate=False)
    for call in (complete, truncated):
        assert torch.equal(call.selections[0].kept, complete.selections[0].kept)
        with torch.no_grad(), call.enter_contexts():
            logits.append(model(**call.inputs).logits)
    assert float((logits[0] - logits[1]).abs().max()) < 1e-5 * max(1.0, float(logits[0].abs().max()))
    with torch.no_grad():
        plain = model(**inputs).logits
        with HiRED(1.0)(model):
            assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("family", ["llava_next", "phi4_multimodal"])
def test_a_pooling_head_runs_only_if_it_is_read(family: str) -> None:
    """In a family whose projector runs on kept tokens only, and in a family whose model projects all tokens."""
    if family == "llava_next":
        adapter: PlaceholderAdapter = LlavaNextAdapter(tiny_model(family, tower="siglip"))
        inputs = dict(batch(family, [(112, 112)], tower="siglip"))
    else:
        adapter, inputs = family_call(family)
    for attention, times in (("auto", 0), ("pooling", 1)):
        with torch.no_grad(), count_calls({"head": adapter.tower.head.mlp}) as runs:
            Pipeline(HiRED(0.5, attention=attention), adapter).prepare(inputs, for_generate=True)
        assert runs["head"] == times
