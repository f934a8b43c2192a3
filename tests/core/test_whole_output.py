"""Test that all fields of an output equal the output of the unmodified model at a budget of 100 %, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.outputs import list_differences
from tokenprune.adapter import find_adapter
from tokenprune.strategies import HiRED
from tokenprune.testing.families.base import Family

NO_OPTIONS = {"phi4_multimodal": "the unmodified model raises when its vision side records hidden states"}


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    model = family.model()
    model.set_attn_implementation("eager")  # only eager attention returns attention maps
    return model


@pytest.fixture(scope="module")
def inputs(family: Family) -> Any:
    return family.batch(*family.rows)


def test_list_differences() -> None:
    output = {"a": torch.zeros(2), "b": (torch.ones(1), None)}
    assert not list_differences(output, {"a": torch.zeros(2), "b": (torch.ones(1), None)})
    assert list_differences(output, {"b": output["b"], "a": output["a"]})
    assert list_differences(output, {"a": torch.zeros(2), "b": (torch.ones(1), torch.ones(1))}) == [
        "output.b[1]: NoneType and Tensor"
    ]
    assert list_differences(output, {"a": torch.full((2,), 1e-9), "b": output["b"]}) == ["output.a"]


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True, "output_attentions": True, "use_cache": True}])
@pytest.mark.parametrize("budget", [1.0, 10_000])
@torch.no_grad()
def test_forward_at_a_full_budget(
    family: Family, model: Any, inputs: Any, options: dict[str, Any], budget: float
) -> None:
    if options and family.name in NO_OPTIONS:
        pytest.skip(NO_OPTIONS[family.name])
    before = model(**inputs, **options)
    with HiRED(budget)(model):
        during = model(**inputs, **options)
    assert list_differences(before, during) == []
    assert list_differences(before, model(**inputs, **options)) == []


@torch.no_grad()
def test_all_tokens_kept_below_a_full_budget(family: Family, model: Any, inputs: Any) -> None:
    """A token budget that no image exceeds changes no output, although the tower stops early."""
    max_tokens = max(int(layout.valid.sum()) for layout in find_adapter(model).layouts(inputs))
    before = model(**inputs)
    with HiRED(max_tokens, newlines="keep")(model) as run:
        during = model(**inputs)
    assert all(selection.is_identity for selection in run.selections)
    assert list_differences(before, during) == []


@torch.no_grad()
def test_tuple_outputs(model: Any, inputs: Any) -> None:
    before = model(**inputs, return_dict=False)
    with HiRED(1.0)(model):
        assert list_differences(before, model(**inputs, return_dict=False)) == []


@torch.no_grad()
def test_generate_at_a_full_budget(family: Family, model: Any, inputs: Any) -> None:
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"output_hidden_states": True, "suppress_tokens": [find_adapter(model).image_token_id]}
    if family.name in NO_OPTIONS:
        options.pop("output_hidden_states")
    before = model.generate(**inputs, **options)
    with HiRED(1.0)(model):
        assert list_differences(before, model.generate(**inputs, **options)) == []


@torch.no_grad()
def test_inputs_embeds(family: Family, model: Any, inputs: Any) -> None:
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embedded_inputs = {
        "inputs_embeds": embeds,
        **{name: value for name, value in inputs.items() if name != "input_ids"},
    }
    try:
        before = model(**embedded_inputs)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        pytest.skip(f"the unmodified model takes no inputs_embeds with images: {error}")
    with HiRED(1.0)(model):
        assert list_differences(before, model(**embedded_inputs)) == []
    if not torch.equal(before.logits, model(**inputs).logits):
        pytest.skip("the unmodified model ignores images next to inputs_embeds")
    with HiRED(0.3)(model) as run:
        embedded = model(**embedded_inputs).logits
        assert torch.equal(embedded, model(**inputs).logits)
    half = len(run.selections) // 2
    assert all(
        torch.equal(selection.kept, reference.kept)
        for selection, reference in zip(run.selections[:half], run.selections[half:], strict=True)
    )


@torch.no_grad()
def test_a_filled_cache(family: Family, model: Any, inputs: Any) -> None:
    """A second turn that continues from the cache of the first turn has equal outputs."""
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    options |= {"suppress_tokens": [find_adapter(model).image_token_id]}

    def generate_two_turns() -> Any:
        first = model.generate(**inputs, **options)
        ids = torch.cat([first.sequences, first.sequences[:, -1:]], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 3, dtype=torch.long)], dim=1)
        mask_inputs = {name: value for name, value in inputs.items() if name == "cross_attention_mask"}
        mask_inputs = {
            name: torch.cat([value, value[:, -1:].expand(-1, 3, -1, -1)], dim=1) for name, value in mask_inputs.items()
        }
        return model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **mask_inputs, **options
        )

    try:
        before = generate_two_turns()
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        pytest.skip(f"the unmodified model does not continue from a cache of padded rows: {error}")
    with HiRED(1.0)(model):
        assert list_differences(before, generate_two_turns()) == []


@pytest.mark.parametrize("budget", [1.0, 0.2])
@torch.no_grad()
def test_assisted_decoding_with_the_model_itself(family: Family, model: Any, budget: float) -> None:
    row = next(row for row in family.rows if row)
    inputs = family.batch(row)
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [find_adapter(model).image_token_id]}
    try:
        plain = model.generate(**inputs, assistant_model=model, **options)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        pytest.skip(f"the unmodified model does not assist itself: {error}")
    with HiRED(budget)(model):
        assisted = model.generate(**inputs, assistant_model=model, **options)
        greedy = model.generate(**inputs, **options)
    assert torch.equal(assisted, greedy)
    assert budget < 1.0 or torch.equal(assisted, plain)
