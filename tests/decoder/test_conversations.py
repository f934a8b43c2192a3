"""Conversations that continue from a narrow cache: a text turn, and a second image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.decoder import LargestStates, LargestStatesTwice, hide_dropped, load_model, visible_masks
from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.caches import find_cache
from tokenprune.testing.families.base import Family

NAMES = ["llava_next", "gemma3", "idefics3"]


def text_turn(family: Family, turn: Any) -> Tensor:
    """Return the ids of a turn of text for each row."""
    ids = torch.tensor(family.tokenizer("which shape is left of it")["input_ids"])
    return ids.expand(len(turn["input_ids"]), -1)


def text_inputs(ids: Tensor, mask: Tensor, cache: Any) -> dict[str, Any]:
    """Return the inputs of a turn of text."""
    mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_text_turn_and_a_second_image(name: str) -> None:
    family, model = FAMILIES[name], load_model(name)
    first = family.batch([family.sizes[0]], [family.sizes[1]])
    second = family.batch([family.sizes[2]], [family.sizes[0]], first=2)
    ids = text_turn(family, first)

    def converse() -> list[Tensor]:
        """Return the logits of three turns."""
        output = model(**first, use_cache=True)
        inputs = text_inputs(ids, first["attention_mask"], find_cache(output))
        text = model(**inputs)
        mask = torch.cat([inputs["attention_mask"], second["attention_mask"]], dim=1)
        image = model(**{**second, "attention_mask": mask, "past_key_values": find_cache(text), "use_cache": True})
        return [output.logits, text.logits, image.logits]

    with LargestStates(0.4)(model) as run:
        logits = converse()
    (cut,) = run.cuts
    assert len(cut.selections) == 4
    adapter, parts = find_adapter(model), []
    for turn, selections in ((first, cut.selections[:2]), (second, cut.selections[2:])):
        visible = turn["attention_mask"].bool().clone()
        visible[adapter.placeholders(turn)] = torch.cat([selection.packed_mask() for selection in selections])
        parts.append(visible)
    sequence = torch.cat([parts[0], torch.ones_like(ids).bool(), parts[1]], dim=1)
    full = converse()
    with hide_dropped(model, [(cut.layer, sequence)]):
        expected = converse()
    real = [parts[0], torch.ones_like(ids).bool(), parts[1]]
    for result, oracle, plain, positions in zip(logits, expected, full, real, strict=True):
        assert float((result - oracle)[positions].abs().max()) < 1e-5
        assert float((result - plain)[positions].abs().max()) > 1e-3


@pytest.mark.parametrize("name", [*NAMES, "qwen2_5_vl"])
@torch.no_grad()
def test_generate_from_a_narrow_cache(name: str) -> None:
    """The second call of `generate` receives the ids of the whole conversation, and its cache."""
    family, model = FAMILIES[name], load_model(name)
    first = family.batch([family.sizes[0]], [family.sizes[1]])
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "suppress_tokens": [find_adapter(model).image_token_id],
        "output_logits": True,
        "return_dict_in_generate": True,
    }

    def converse() -> list[Tensor]:
        """Return ids and logits of two calls."""
        answer = model.generate(**first, **options)
        ids = torch.cat([answer.sequences, text_turn(family, first)], dim=1)
        mask = torch.nn.functional.pad(
            first["attention_mask"], (0, ids.shape[1] - first["input_ids"].shape[1]), value=1
        )
        reply = model.generate(input_ids=ids, attention_mask=mask, past_key_values=find_cache(answer), **options)
        return [answer.sequences, reply.sequences, torch.stack(answer.logits), torch.stack(reply.logits)]

    with LargestStates(0.4)(model) as run:
        results = converse()
    with hide_dropped(model, visible_masks(model, first, run)):
        expected = converse()
    assert [len(cut.selections) for cut in run.cuts] == [2]
    for result, oracle in zip(results, expected, strict=True):
        assert float((result - oracle).abs().nan_to_num(0.0).max()) < 1e-5


@torch.no_grad()
def test_generate_with_a_second_image() -> None:
    family, model = FAMILIES["llava_next"], load_model("llava_next", 6)
    first, second = family.batch([family.sizes[0]]), family.batch([family.sizes[2]], first=1)
    adapter = find_adapter(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [adapter.image_token_id]}
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)

    def converse() -> tuple[Tensor, Tensor]:
        cache = find_cache(model(**first, use_cache=True))
        vision = {name: second[name] for name in ("pixel_values", "image_sizes")}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **vision, "past_key_values": cache}
        output = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        return output.sequences, torch.stack(output.logits)

    with LargestStatesTwice()(model) as run:
        tokens, logits = converse()
    masks, visible = [], torch.ones_like(ids).bool()
    is_image = ids == adapter.image_token_id
    for cut in run.cuts:
        visible, left = visible.clone(), is_image & visible
        visible[left] = torch.cat([selection.packed_mask() for selection in cut.selections])
        masks.append((cut.layer, visible))
    with hide_dropped(model, masks):
        expected_tokens, expected = converse()
    assert torch.equal(tokens, expected_tokens)
    assert float((logits - expected).abs().nan_to_num(0.0).max()) < 1e-5


@pytest.mark.parametrize("name", ["llava_next", "gemma3"])
@torch.no_grad()
def test_a_cache_continues_in_another_block(name: str) -> None:
    """Another strategy with other cuts, or with the same cut, continues from the cache."""
    family, model = FAMILIES[name], load_model(name, 6)
    turn = family.batch([family.sizes[0]], [family.sizes[1]])

    def continue_in(reducer: Any) -> Tensor:
        with LargestStates(0.4, layer=2)(model):
            output = model(**turn, use_cache=True)
        inputs = text_inputs(text_turn(family, turn), turn["attention_mask"], find_cache(output))
        with pytest.warns(UserWarning, match="no image went through"), reducer(model):
            return model(**inputs).logits

    expected = continue_in(LargestStates(0.4, layer=2))
    assert torch.equal(continue_in(LargestStatesTwice(schedule=((1, 0.8), (2, 0.4)))), expected)
