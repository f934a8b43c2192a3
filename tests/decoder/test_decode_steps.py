"""Cost of cuts: compiled decode steps, operators of prefill and decode steps, and reads from an accelerator."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from tests.helpers.decoder import (
    LargestStates,
    OperatorCounter,
    deepen,
    load_model,
)
from tests.helpers.emulated_device import EmulatedDevice, move_model, to_device
from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.caches import find_cache
from tokenprune.decoder_reducer import AtLayer
from tokenprune.run import DRAWABLE
from tokenprune.strategies import DivPrune, HiRED
from tokenprune.testing.tiny_models import batch, tiny_model

NAME = "llava_next"
LAYERS = 6


def decode_inputs(model: Any, inputs: Any, cache: Any = None) -> dict[str, Any]:
    """Return the inputs of the first decode step after a prefill."""
    past = {} if cache is None else {"past_key_values": cache}
    output = model(**inputs, use_cache=True, **past)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    positions = (mask.cumsum(1) - 1)[:, -1:]
    ids = torch.full_like(positions, 7)
    cache = find_cache(output) if cache is None else cache
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 2])
@torch.no_grad()
def test_a_compiled_decode_step_is_one_graph(backend: str, rows: int) -> None:
    """The compiled LLM continues from a narrow static cache; rows of different lengths have fillers."""
    family = FAMILIES[NAME]
    model = deepen(family, 3).model()
    inputs, decoder = family.batch(*family.rows[:rows]), find_adapter(model).decoder  # type: ignore[attr-defined]
    graphs: list[Any] = []

    def count(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, examples)

    def decode(step: Any) -> list[Tensor]:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
        step_inputs = decode_inputs(model, inputs, cache)
        embeds = model.get_input_embeddings()(step_inputs.pop("input_ids"))
        states = []
        for number in range(3):
            mask = torch.nn.functional.pad(step_inputs["attention_mask"], (0, number), value=1)
            positions = step_inputs["position_ids"] + number
            states.append(
                step(
                    inputs_embeds=embeds,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=step_inputs["past_key_values"],
                ).last_hidden_state
            )
        return states

    expected_graphs = 1
    torch._dynamo.reset()
    if backend == "aot_eager":  # compiles the unmodified model twice
        decode(torch.compile(decoder, backend=count, fullgraph=True, dynamic=True))
        expected_graphs = len(graphs)
        torch._dynamo.reset()
        graphs.clear()
    with LargestStates()(model):
        expected = decode(decoder)
        states = decode(torch.compile(decoder, backend=count, fullgraph=True, dynamic=True))
    torch._dynamo.reset()
    assert len(graphs) == expected_graphs
    for state, oracle in zip(states, expected, strict=True):
        assert float((state - oracle).abs().max()) < 1e-5


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_operators_of_a_decode_step(rows: int) -> None:
    """Rows of one length add no operator; fillers add one mask for all layers of a cut."""
    family, model = FAMILIES[NAME], load_model(NAME, LAYERS)
    inputs = family.batch(*family.rows[:rows])

    def count(context: Any) -> int:
        with context:
            step = decode_inputs(model, inputs)
            model(**step)
            step["attention_mask"] = torch.nn.functional.pad(step["attention_mask"], (0, 1), value=1)
            step["position_ids"] = step["position_ids"] + 1
            with OperatorCounter() as counter:
                model(**step)
        return counter.count

    plain, reduced = count(nullcontext()), count(LargestStates(layer=2)(model))
    if rows == 1:
        assert reduced == plain
    else:
        assert reduced - plain <= 20


@torch.no_grad()
def test_operators_of_a_prefill_do_not_grow_with_the_layers() -> None:
    family, counts = FAMILIES[NAME], []
    inputs = family.batch(family.rows[0])
    for layers in (LAYERS, 2 * LAYERS):
        model, numbers = load_model(NAME, layers), []
        for context in (nullcontext(), LargestStates(layer=2)(model)):
            with context:
                model(**inputs)
                with OperatorCounter() as counter:
                    model(**inputs)
            numbers.append(counter.count)
        counts.append(numbers[1] - numbers[0])
    assert counts[0] == counts[1] <= 150


@pytest.mark.parametrize("images", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "limit"), [("one cut", 2), ("composed", 0)])
@torch.no_grad()
def test_reads_from_an_accelerator(kind: str, limit: int, images: int) -> None:
    """A cut reads nothing itself. Prompt and image sizes are read before the call; then the model reads them again."""
    cut = AtLayer(1, DivPrune(0.3, newlines="drop"))
    reducer = HiRED(0.5, newlines="drop") >> cut if kind == "composed" else cut
    model = move_model(tiny_model(NAME))
    inputs = dict(batch(NAME, *[[(112, 112)]] * images))

    def count(calls: int) -> EmulatedDevice:
        for _ in range(calls):
            model(**to_device(inputs))
        with EmulatedDevice() as device:
            model(**to_device(inputs))
        return device

    with EmulatedDevice():
        plain = count(1)
        with reducer(model) as run:
            reduced = count(1 + DRAWABLE // images)
    assert run.cuts[0].selections[-1].kept_tokens
    assert sum(reduced.reads.values()) <= sum(plain.reads.values()) + limit
