"""Rows of a batch do not depend on other rows, on padding, or on the answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.decoder import (
    LargestStates,
    LargestStatesTwice,
    generate_logits,
    hide_dropped,
    load_inputs,
    load_model,
    visible_masks,
)
from tests.helpers.families import FAMILIES
from tokenprune.catalog import strategies
from tokenprune.decoder.prompt import PromptLayout
from tokenprune.decoder_reducer import ScheduledReducer
from tokenprune.geometry import TileGeometry
from tokenprune.strategies import HiRED, UniformStride
from tokenprune.testing.families.base import Family

TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
LLAVA = FAMILIES["llava_next"]


@pytest.mark.parametrize("is_composed", [pytest.param(False, marks=pytest.mark.slow), True])
@torch.no_grad()
def test_each_row_equals_itself_alone(family: Family, is_composed: bool) -> None:
    if "test_each_row_equals_itself_alone" in family.skip:
        pytest.skip(family.skip["test_each_row_equals_itself_alone"])
    model, inputs = load_model(family.name), load_inputs(family.name)
    reducer = HiRED(0.4) >> LargestStates(0.3) if is_composed else LargestStates(0.3)
    with reducer(model) as run:
        logits = model(**inputs).logits
    with reducer(model):
        _, steps = generate_logits(model, inputs)
    (cut,), first = run.cuts, 0
    for number, sizes in enumerate(family.rows):
        real = inputs["attention_mask"][number].bool()
        if sizes:
            row = family.batch(sizes, first=number)
            with reducer(model) as row_run:
                row_logits = model(**row).logits
            with reducer(model):
                _, row_steps = generate_logits(model, row)
            for selection in row_run.cuts[0].selections:
                assert torch.equal(selection.kept, cut.selections[first].kept)
                first += 1
        else:
            row = {name: inputs[name][number : number + 1, real] for name in TEXT_KEYS if name in inputs}
            row_logits = model(**row).logits
            _, row_steps = generate_logits(model, row)
        assert float((row_logits[0] - logits[number, real]).abs().max()) < 1e-4
        assert float((row_steps[:, 0] - steps[:, number]).abs().nan_to_num(0.0).max()) < 1e-4
    assert first == len(cut.selections) == sum(map(len, family.rows))


@torch.no_grad()
def test_ways_of_generating_agree(family: Family) -> None:
    """Also for convolutions, whose reduction masks cannot express."""
    model, inputs = load_model(family.name), load_inputs(family.name)
    with LargestStates(0.3)(model):
        tokens, logits = generate_logits(model, inputs)
        for options in ({"use_cache": False}, {"cache_implementation": "static"}):
            other_tokens, other = generate_logits(model, inputs, **options)
            assert torch.equal(tokens, other_tokens), options
            assert float((logits - other).abs().nan_to_num(0.0).max()) < 1e-5, options


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_loss_is_that_of_the_prompt_without_dropped_tokens(name: str, side: str) -> None:
    family, model = FAMILIES[name], load_model(name)
    inputs = family.batch(*family.rows[:2], side=side)
    is_first = inputs["attention_mask"].cumsum(1) == 1
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | is_first, -100)
    copy = labels.clone()
    with LargestStates(0.3)(model) as run:
        output = model(**inputs, labels=labels)
    assert torch.equal(labels, copy)
    assert output.logits.shape[:2] == labels.shape
    ((layer, visible),) = visible_masks(model, inputs, run)
    with hide_dropped(model, [(layer, visible)]):
        logits = model(**inputs).logits
    losses = [
        torch.nn.functional.cross_entropy(row[kept][:-1], targets[kept][1:], reduction="none")
        for row, kept, targets in zip(logits, visible, labels, strict=True)
    ]
    assert float(output.loss - torch.cat(losses).mean()) == pytest.approx(0.0, abs=1e-5)


def prompt_layout(labels: Tensor | None = None, side: str = "left") -> PromptLayout:
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    real = real.flip(1) if side == "right" else real
    return PromptLayout(torch.zeros_like(real), real, [4, 6], [], [], labels)


def test_the_last_token_precedes_the_answer() -> None:
    assert prompt_layout().last.tolist() == [5, 5]
    assert prompt_layout(side="right").last.tolist() == [3, 5]
    labels = torch.full((2, 6), -100)
    assert prompt_layout(labels).last.tolist() == [5, 5]
    labels[0, 4:], labels[1, 2:4] = 7, 7
    assert prompt_layout(labels).last.tolist() == [3, 1]
    assert prompt_layout(labels.clone().fill_(7)).last.tolist() == [5, 5]  # everything has a label: no prompt before it


def test_text_after_images_without_tokens() -> None:
    placeholders = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    image, empty = TileGeometry.single((1, 2)), TileGeometry.single((1, 2)).restrict(torch.zeros(2, dtype=torch.bool))
    layout = PromptLayout(placeholders, torch.ones(2, 5).bool(), [5, 5], [empty, image, empty], [0, 0, 1])
    assert [positions.tolist() for positions in layout.text] == [[0, 3, 4], [3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("name", ["DART", "FastV", "SparseVLM", "TransPrune", "VisionDrop"])
@pytest.mark.parametrize("entered", [0, 1.0])
@torch.no_grad()
def test_no_tokens_are_left(name: str, entered: int | float) -> None:
    """No token enters the LLM, or the cuts keep none: the cuts run, and the next one reads an empty image."""
    kind: Any = strategies()[name]
    options = {"schedule": ((1, 0), (2, 0))} if issubclass(kind, ScheduledReducer) else {"layer": 1, "budget": 0}
    model, inputs = load_model("llava_next", 6), load_inputs("llava_next")
    with (UniformStride(entered) >> kind(**options))(model) as run:
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert [{selection.kept_tokens for selection in cut.selections} for cut in run.cuts] == [{0}] * len(run.cuts)
    assert run.cuts


@torch.no_grad()
def test_the_choice_does_not_read_the_answer() -> None:
    model, inputs = load_model("llava_next"), LLAVA.batch(LLAVA.rows[0], LLAVA.rows[1])
    kept = []
    for answer in (5, 9):
        ids = inputs["input_ids"].clone()
        ids[:, -4:] = answer
        labels = torch.full_like(ids, -100)
        labels[:, -4:] = answer
        with LargestStates(0.3)(model) as run:
            model(**{**inputs, "input_ids": ids}, labels=labels)
        kept.append([selection.kept for selection in run.cuts[0].selections])
    assert all(torch.equal(*pair) for pair in zip(*kept, strict=True))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
@torch.no_grad()
def test_repeated_rows_share_one_choice(options: dict[str, Any]) -> None:
    model, inputs = load_model("llava_next"), load_inputs("llava_next")
    with LargestStates(0.3)(model) as run:
        generate_logits(model, inputs, **options)
    with LargestStates(0.3)(model) as plain:
        model(**inputs)
    pairs = list(zip(run.cuts[0].selections, plain.cuts[0].selections, strict=True))
    assert len(pairs) == 4
    assert all(torch.equal(selection.kept, expected.kept) for selection, expected in pairs)


@torch.no_grad()
def test_a_batch_of_text_only_is_unchanged() -> None:
    model, inputs = load_model("llava_next"), load_inputs("llava_next")
    text = {name: inputs[name][2:3] for name in TEXT_KEYS if name in inputs}
    expected = model(**text).logits
    with pytest.warns(UserWarning, match="no image went through"), LargestStates(0.3)(model) as run:
        assert torch.equal(model(**text).logits, expected)
    assert run.cuts == []


@pytest.mark.parametrize("name", ["llava_next", "idefics3"])
@torch.no_grad()
def test_hidden_states_and_logits_keep_their_shapes(name: str) -> None:
    model, inputs = load_model(name, 6), load_inputs(name)
    options: dict[str, Any] = {"output_hidden_states": True, "use_cache": True}
    full = model(**inputs, **options)
    with LargestStatesTwice()(model) as run:
        output = model(**inputs, **options)
        thin = model(**inputs)
        last = model(**inputs, logits_to_keep=2).logits
        generated = model.generate(
            **inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True
        )
    assert [state.shape for state in output.hidden_states] == [state.shape for state in full.hidden_states]
    assert torch.equal(output.logits, thin.logits)  # wide and thin layers
    assert torch.equal(output.logits[:, -2:], last)
    assert [state.shape[1] for state in generated.hidden_states[0]] == [inputs["input_ids"].shape[1]] * 7
    for before, after in zip(full.hidden_states[:3], output.hidden_states[:3], strict=True):
        assert torch.equal(before, after)
    selection = run.cuts[0].selections[0]
    assert selection.kept_tokens < selection.geometry.valid_tokens
    (_, visible), _ = visible_masks(model, inputs, first_call(run))
    state = output.hidden_states[3]
    dropped = (inputs["attention_mask"].bool() & ~visible)[:, 1:]
    repeated = (state[:, 1:] == state[:, :-1]).all(dim=-1)
    assert bool(repeated[dropped].all())  # a dropped position shows the state of the last kept one


def first_call(run: Any) -> Any:
    """Return the record restricted to the four images of its first call."""
    cuts = [SimpleNamespace(layer=cut.layer, selections=cut.selections[:4]) for cut in run.cuts]
    return SimpleNamespace(rows=run.rows, cuts=cuts)


@torch.no_grad()
def test_tuple_outputs() -> None:
    model, inputs = load_model("llava_next"), load_inputs("llava_next")
    with LargestStates(0.3)(model):
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
