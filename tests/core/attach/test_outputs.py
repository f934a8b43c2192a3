"""Pipelines, streamers, length limits and dictionary outputs follow the full prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

from tests.helpers.llava import WIDE
from tests.helpers.oracle import build_answer, generate
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, random_image, tiny_model, tiny_processor, tokenizer


def test_pipeline(model: Any, family: str) -> None:
    answer = build_answer(
        model, tiny_processor(family), random_image(*WIDE), "USER: <image> how many shapes ASSISTANT:"
    )
    before = answer()
    with HiRED(1.0)(model):
        assert answer() == before
    with HiRED(2)(model) as run:
        short = answer()
    assert run.account.kept == 2
    assert "USER" not in short


def test_streamers_receive_the_full_prompt_once(model: Any, family: str) -> None:
    inputs = batch(family, [WIDE])
    with_prompt = TextIteratorStreamer(tokenizer(), skip_prompt=False)
    without_prompt = TextIteratorStreamer(tokenizer(), skip_prompt=True)
    with HiRED(0.2)(model):
        out = generate(model, inputs, streamer=with_prompt)
        generate(model, inputs, streamer=without_prompt)
    assert "".join(with_prompt) == tokenizer().decode(out[0])
    assert "".join(without_prompt) == tokenizer().decode(out[0, inputs["input_ids"].shape[1] :])
    assert issubclass(TextIteratorStreamer, TextStreamer)


@pytest.mark.parametrize("source", ["argument", "config", "model"])
def test_total_length_limits_count_the_full_prompt(family: str, source: str) -> None:
    model, inputs = tiny_model(family), batch(family, [WIDE])
    limit = inputs["input_ids"].shape[1] + 4
    model.generation_config.eos_token_id = None
    suppress = [model.config.image_token_id]
    arguments: dict[str, Any] = {"suppress_tokens": suppress}
    if source == "argument":
        arguments |= {"max_length": limit}
    elif source == "config":
        arguments["generation_config"] = copy.deepcopy(model.generation_config)
        arguments["generation_config"].max_length = limit
    else:
        model.generation_config.max_length = limit
    with HiRED(0.2)(model):
        out = model.generate(**inputs, **arguments)
    assert out.shape[1] == limit
    if source == "config":
        assert arguments["generation_config"].max_length == limit


def test_dictionary_output_has_the_full_prompt(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model):
        plain = generate(model, inputs)
        out = generate(model, inputs, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, plain)
    assert torch.equal(out["sequences"], plain)
    assert len(out.scores) == 6
