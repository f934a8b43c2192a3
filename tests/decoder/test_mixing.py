"""Mixed tokens at a cut: the mixtures of hidden states take the places of the kept tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.helpers.decoder import (
    LargestStates,
    LargestStatesTwice,
    generate_logits,
    hide_dropped,
    load_inputs,
    load_model,
    visible_masks,
)
from tokenprune.adapter import find_adapter
from tokenprune.decoder_reducer import AtLayer
from tokenprune.image import EncodedImage
from tokenprune.run import Run
from tokenprune.selection import Selection
from tokenprune.strategies import PruMerge, VisionZip


def mix_selection(selection: Selection) -> Selection:
    """Return the selection with random mixtures of the valid tokens."""
    columns = selection.geometry.valid.flatten()
    generator = torch.Generator().manual_seed(len(columns))
    weights = torch.rand(selection.kept_tokens, len(columns), generator=generator) * columns
    return replace(selection, mixing=weights / weights.sum(dim=1, keepdim=True))


@dataclass
class MixedStates(LargestStates):
    """Mixes all tokens into the tokens that remain."""

    def select(self, image: EncodedImage) -> Selection:
        """Return a selection with random mixtures."""
        return mix_selection(super().select(image))


@dataclass
class MixedStatesTwice(LargestStatesTwice):
    """Mixes the tokens that are left at two cuts."""

    def select(self, image: EncodedImage) -> Selection:
        """Return a selection with random mixtures."""
        return mix_selection(super().select(image))


@contextmanager
def write_mixtures(model: Any, inputs: Any, run: Run) -> Iterator[None]:
    """Write the mixtures of a run into the hidden states that enter the layers of its cuts."""
    adapter, handles = find_adapter(model), []
    placeholders, rows = adapter.placeholders(inputs), len(inputs["input_ids"])
    left = placeholders.clone()
    for cut in run.cuts:
        lengths = [len(selection.geometry.packed) for selection in cut.selections]
        edits, places = [], left.nonzero().split(lengths)
        for selection, positions in zip(cut.selections, places, strict=True):
            packed, kept = selection.geometry.packed, selection.packed_mask()
            is_token = packed >= 0
            edits.append((selection.mixing, packed[is_token], positions[is_token], positions[is_token & kept]))

        def enter(module: Any, args: Any, edits: Any = edits) -> Any:
            hidden = args[0].clone()
            if hidden.shape[1] < placeholders.shape[1]:
                return None
            repeats = len(hidden) // rows
            for mixing, tokens, sources, targets in edits:
                for repeat in range(repeats):
                    states = args[0][sources[:, 0] * repeats + repeat, sources[:, 1]]
                    mixed = mixing.to_dense()[:, tokens] @ states
                    hidden[targets[:, 0] * repeats + repeat, targets[:, 1]] = mixed
            return (hidden, *args[1:])

        handles.append(adapter.decoder.layers[cut.layer].register_forward_pre_hook(enter))  # type: ignore[attr-defined]
        left = left.clone()
        left[left.clone()] = torch.cat([selection.packed_mask() for selection in cut.selections])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
@pytest.mark.parametrize("cuts", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", ["llava_next", "idefics3"])
@torch.no_grad()
def test_mixtures_equal_the_layer_oracle(name: str, cuts: int, options: dict[str, Any]) -> None:
    model, inputs = load_model(name, 6), load_inputs(name)
    reducer = MixedStates(layer=2) if cuts == 1 else MixedStatesTwice()
    with reducer(model) as run:
        tokens, logits = generate_logits(model, inputs, **options)
    assert all(selection.mixing is not None for cut in run.cuts for selection in cut.selections)
    masks = visible_masks(model, inputs, run)
    with hide_dropped(model, masks):
        _, plain = generate_logits(model, inputs, **options)
        with write_mixtures(model, inputs, run):
            expected_tokens, expected = generate_logits(model, inputs, **options)
    assert torch.equal(tokens, expected_tokens)
    assert float((logits - expected).abs().nan_to_num(0.0).max()) < 1e-5
    assert float((logits - plain).abs().nan_to_num(0.0).max()) > 1e-3


@torch.no_grad()
def test_mixtures_with_hidden_states_of_all_layers() -> None:
    """Wide layers write the mixtures once."""
    model, inputs = load_model("llava_next", 6), load_inputs("llava_next")
    with MixedStatesTwice()(model):
        assert torch.equal(model(**inputs, output_hidden_states=True).logits, model(**inputs).logits)


@dataclass
class MixedBeforeProjector(LargestStates):
    """Marks its mixtures as mixtures before the projector."""

    def select(self, image: EncodedImage) -> Selection:
        """Return the selection with a mixing matrix before the projector."""
        selection = super().select(image)
        mixing = torch.eye(image.geometry.tiles * image.geometry.tokens)[selection.kept.flatten()]
        return replace(selection, mixing=mixing, before_projector=True)


@pytest.mark.parametrize("strategy", [VisionZip, PruMerge])
def test_strategies_that_mix_before_the_projector_have_no_cut(strategy: Any) -> None:
    with pytest.raises(ValueError, match="mixes tokens before the projector"):
        AtLayer(1, strategy(0.3))


@torch.no_grad()
def test_mixtures_before_the_projector_are_refused() -> None:
    model, inputs = load_model("llava_next"), load_inputs("llava_next")
    with MixedBeforeProjector()(model), pytest.raises(ValueError, match=r"mix them before the projector.*AtLayer"):
        model(**inputs)
