"""Reduced prompts padded on the left to a multiple of a width give the results of prompts without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.llava import GENERATION, POSITIONS, ROWS, SQUARE, TWO_ROWS, WIDE
from tests.helpers.oracle import generate
from tokenprune import align
from tokenprune.rewrite import Rows
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, tiny_model

MULTIPLE = 32


def make_labels(inputs: Any) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def test_rows_are_padded_to_the_next_multiple() -> None:
    rows = Rows(torch.tensor([[1, 3, 4], [0, 2, 0]]), torch.tensor([[True] * 3, [True, True, False]]), 6)
    padded = rows.pad_left(4)
    assert padded.index.tolist() == [[0, 1, 3, 4], [0, 0, 2, 0]]
    assert padded.mask.tolist() == [[False, True, True, True], [False, True, True, False]]
    assert padded.length == 6
    assert padded.pad_left(2) is padded
    values = torch.arange(12).view(2, 6)
    assert padded.take(values, -1).tolist() == [[-1, 1, 3, 4], [-1, 6, 8, -1]]
    shorter = rows.expand(rows.take(values, -1))
    assert torch.equal(padded.expand(padded.take(values, -1)), shorter)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_outputs_of_a_call(family: str, positions: Any, side: str) -> None:
    model, inputs, reducer = tiny_model(family), batch(family, *ROWS, side=side), HiRED(0.3, positions=positions)
    options = {**inputs, "labels": make_labels(inputs), "output_hidden_states": True}
    with torch.no_grad():
        with reducer(model) as run:
            expected, rows = model(**options), run.rows
        with reducer(model, pad_to_multiple_of=MULTIPLE) as padded_run:
            output, padded_rows = model(**options), padded_run.rows
    assert rows is not None
    assert padded_rows is not None
    assert padded_rows.index.shape[1] == -(-rows.index.shape[1] // MULTIPLE) * MULTIPLE > rows.index.shape[1]
    is_token = inputs["attention_mask"].bool()
    assert torch.allclose(output.logits[is_token], expected.logits[is_token], atol=1e-5)
    assert torch.allclose(output.hidden_states[1][is_token], expected.hidden_states[1][is_token], atol=1e-5)
    assert torch.allclose(output.loss, expected.loss, atol=1e-5)
    kept = align(inputs["input_ids"], padded_rows)[padded_rows.mask]
    assert torch.equal(kept, align(inputs["input_ids"], rows)[rows.mask])
    assert padded_run.account.average_tokens == run.account.average_tokens


def test_reduced_outputs_have_the_padded_width(family: str) -> None:
    model, inputs = tiny_model(family), batch(family, [SQUARE])
    with torch.no_grad(), HiRED(0.3)(model, outputs="reduced", pad_to_multiple_of=MULTIPLE) as run:
        logits = model(**inputs).logits
    assert run.rows is not None
    assert logits.shape[1] == run.rows.index.shape[1]
    assert logits.shape[1] % MULTIPLE == 0


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("method", GENERATION)
def test_padding_does_not_change_generated_tokens(family: str, method: str, positions: Any) -> None:
    model, inputs, options = tiny_model(family), batch(family, *TWO_ROWS), GENERATION[method]
    with HiRED(0.3, positions=positions)(model):
        expected = generate(model, inputs, **options)
    with HiRED(0.3, positions=positions)(model, pad_to_multiple_of=MULTIPLE):
        assert torch.equal(generate(model, inputs, **options), expected)
    repeats = len(expected) // len(inputs["input_ids"])
    assert torch.equal(expected[::repeats, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_padding_does_not_change_a_batch_that_is_padded_on_the_right(family: str) -> None:
    model, inputs = tiny_model(family), batch(family, *TWO_ROWS, side="right")
    with HiRED(0.3)(model):
        expected = generate(model, inputs)
    with HiRED(0.3)(model, pad_to_multiple_of=MULTIPLE):
        assert torch.equal(generate(model, inputs), expected)


def test_a_prompt_can_become_wider_than_the_full_prompt(family: str) -> None:
    model, inputs = tiny_model(family), batch(family, [WIDE])
    with HiRED(0.9)(model):
        expected = generate(model, inputs)
    with HiRED(0.9)(model, pad_to_multiple_of=256):
        assert torch.equal(generate(model, inputs), expected)
        logits = model(**inputs, logits_to_keep=1).logits
    assert logits.shape[1] == 1


def test_the_full_budget_is_not_padded(family: str) -> None:
    model, inputs = tiny_model(family), batch(family, *TWO_ROWS)
    expected = model(**inputs).logits
    with HiRED(1.0)(model, pad_to_multiple_of=MULTIPLE):
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("multiple", [0, -8])
def test_a_multiple_must_be_positive(multiple: int) -> None:
    with pytest.raises(ValueError, match=r"pad_to_multiple_of=-?\d+ is not positive"):
        HiRED(0.2)(tiny_model("llava"), pad_to_multiple_of=multiple)
