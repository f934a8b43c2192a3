"""Logits processors and stopping criteria get the full prompt, and n-grams follow the neighbors of kept tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from tests.helpers.generation import NEW, Recorder, RecordingProcessor, generate, image_token, masked_full_inputs
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch


class RecordingCriterion(Recorder, StoppingCriteria):
    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.ids.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.total)


MODES: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("as_list", [True, False])
@torch.no_grad()
def test_functions_get_the_full_prompt(model: Any, inputs: Any, mode: str, as_list: bool) -> None:
    prompt = inputs["input_ids"]
    length = prompt.shape[1]
    processor, criterion, prefixes = RecordingProcessor(), RecordingCriterion(length + 2), []

    def prefix(row: int, ids: Tensor) -> list[int]:
        prefixes.append((row, ids.clone()))
        return list(range(3, 300))

    processors: Any = [processor] if as_list else LogitsProcessorList([processor])
    criteria: Any = [criterion] if as_list else StoppingCriteriaList([criterion])
    functions = {"logits_processor": processors, "stopping_criteria": criteria, "prefix_allowed_tokens_fn": prefix}
    with HiRED(0.2)(model):
        output = generate(model, inputs, {**MODES[mode], **functions, "max_new_tokens": 6})
    assert output.shape[1] == length + 2
    for ids in [*processor.ids, *criterion.ids]:
        assert torch.equal(ids[:, :length], prompt.repeat_interleave(len(ids) // len(prompt), dim=0))
        assert ids.shape[1] - length <= 2
    assert {ids.shape[1] for ids in processor.ids} == {length, length + 1}
    assert {row for row, _ in prefixes} == {0, 1}
    assert all(torch.equal(ids[:length], prompt[row]) for row, ids in prefixes)


@torch.no_grad()
def test_processors_of_transformers_keep_their_meaning(model: Any, inputs: Any) -> None:
    """Lengths count the full prompt, also if the config creates a processor of the same type."""
    length, end_tokens = inputs["input_ids"].shape[1], list(range(3, 400))
    cases: list[dict[str, Any]] = [
        {"logits_processor": [MinLengthLogitsProcessor(length + 3, end_tokens)], "eos_token_id": end_tokens},
        {
            "logits_processor": [MinLengthLogitsProcessor(length + 3, end_tokens)],
            "eos_token_id": end_tokens,
            "min_length": length,
        },
        {"logits_processor": [MinNewTokensLengthLogitsProcessor(length, 2, end_tokens)], "eos_token_id": end_tokens},
        {"stopping_criteria": [MaxLengthCriteria(length + 2)]},
        {"stopping_criteria": [MaxTimeCriteria(1000.0), MaxLengthCriteria(length + 3)], "max_new_tokens": 5},
    ]
    for arguments in cases:
        with HiRED(0.2)(model) as run:
            short = generate(model, inputs, arguments)
        assert torch.equal(short, generate(model, masked_full_inputs(model, inputs, run), arguments)), arguments


@torch.no_grad()
def test_a_repeated_function_runs_once(model: Any, inputs: Any) -> None:
    """The number of calls is the same with and without a strategy."""
    counts = []
    for budget in (None, 0.2, 1.0):
        processor, criterion = RecordingProcessor(), RecordingCriterion(1000)
        arguments = {"logits_processor": [processor, processor], "stopping_criteria": [criterion, criterion]}
        with nullcontext() if budget is None else HiRED(budget)(model):
            generate(model, inputs, arguments)
        counts.append((len(processor.ids), len(criterion.ids)))
    assert counts == [(NEW, NEW)] * 3


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("has_default", [False, True])
@torch.no_grad()
def test_ignored_prompt_lengths(model: Any, inputs: Any, beams: int, has_default: bool) -> None:
    """Penalties start at a position of the full prompt: at its end, inside an image, or at one position per row."""
    length = inputs["input_ids"].shape[1]
    rows = torch.tensor([length - 3, length - 6]).repeat_interleave(beams)
    for ignored in (length, length - 3, length + 1, 40, rows):
        arguments: dict[str, Any] = {
            "max_new_tokens": 8,
            "num_beams": beams,
            "logits_processor": [RepetitionPenaltyLogitsProcessor(5.0, prompt_ignore_length=ignored)],
            "suppress_tokens": [image_token()],
            "return_dict_in_generate": True,
            "output_scores": True,
        }
        if has_default:
            arguments["repetition_penalty"] = 1.3
        with HiRED(0.2)(model) as run:
            short = model.generate(**inputs, **arguments)
        full = model.generate(**masked_full_inputs(model, inputs, run), **arguments)
        assert torch.equal(short.sequences, full.sequences)
        for a, b in zip(short.scores, full.scores, strict=True):
            a, b = (scores.index_fill(1, torch.tensor([image_token()]), 0) for scores in (a, b))
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        stored_length = arguments["logits_processor"][0].prompt_ignore_length
        assert stored_length is ignored  # the object of the caller does not change


@torch.no_grad()
def test_a_prefix_processor_of_the_caller_gets_the_full_prompt(model: Any, inputs: Any) -> None:
    prompt, calls = inputs["input_ids"], []

    def prefix(row: int, ids: Tensor) -> list[int]:
        calls.append((row, ids.clone()))
        return list(range(3, 300))

    with HiRED(0.2)(model):
        generate(model, inputs, {"logits_processor": [PrefixConstrainedLogitsProcessor(prefix, 3)], "num_beams": 3})
    assert {row for row, _ in calls} == {0, 1}
    assert all(torch.equal(ids[: prompt.shape[1]], prompt[row]) for row, ids in calls)


AROUND = (224, 263)
"""The tokens before and after the image of the second sentence of `batch`."""
ADJACENT: Mapping[str, Any] = {
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "no_repeat_ngram_size, object": {"logits_processor": [NoRepeatNGramLogitsProcessor(2)]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
}
"""Options that compare n-grams."""


@pytest.mark.parametrize("name", ADJACENT)
@torch.no_grad()
def test_tokens_around_an_image_without_kept_tokens_are_no_bigram(model: Any, name: str) -> None:
    """The forced bigram is allowed in the masked full prompt, and would be banned in the reduced prompt."""
    inputs = batch("llava_next", [(60, 160)])
    length, text = inputs["input_ids"].shape[1], inputs["input_ids"][inputs["input_ids"] != image_token()].tolist()
    assert tuple(text[2:4]) == AROUND

    def prefix(row: int, ids: Tensor) -> list[int]:
        return [AROUND[0]] if len(ids) == length else [AROUND[1], 9]

    processors = [*ADJACENT[name].get("logits_processor", []), PrefixConstrainedLogitsProcessor(prefix, 1)]
    forced = {"logits_processor": processors, "max_new_tokens": 2, "sequence_bias": [[[AROUND[1]], 50.0]]}
    with HiRED(0.2)(model) as run:
        short = generate(model, inputs, {**ADJACENT[name], **forced})
    assert torch.equal(short, generate(model, masked_full_inputs(model, inputs, run), {**ADJACENT[name], **forced}))
    assert tuple(short[0, length:].tolist()) == AROUND
    with HiRED(0.0)(model):
        message = name.split(",")[0] + " compares neighboring tokens"
        with pytest.raises(ValueError, match=message):
            generate(model, inputs, {**ADJACENT[name], **forced})


ENDS: Mapping[str, Mapping[str, Any]] = {
    "sequence_bias": {"sequence_bias": [[[29, 224, 5], 30.0]]},
    "bad_words_ids": {"bad_words_ids": [[224, 5]]},
    "stop_strings": {"stop_strings": "e: a", "tokenizer": "of the model"},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "watermarking_config": {"watermarking_config": WatermarkingConfig()},
    "guidance_scale": {"guidance_scale": 1.5},
}
"""Options that read the end of the prompt."""


@pytest.mark.parametrize("name", ENDS)
@torch.no_grad()
def test_the_end_of_the_prompt(model: Any, name: str) -> None:
    """If the last image keeps no token, an error is raised. Otherwise, the result equals the masked full prompt."""
    inputs = batch("llava_next", [(60, 160)])
    end = int((inputs["input_ids"][0] == image_token()).nonzero()[-1]) + 1
    inputs = {**inputs, **{key: inputs[key][:, :end] for key in ("input_ids", "attention_mask")}}
    with HiRED(0.2)(model) as run:
        short = generate(model, inputs, ENDS[name])
    assert torch.equal(short, generate(model, masked_full_inputs(model, inputs, run), ENDS[name]))
    with HiRED(0.0)(model), pytest.raises(ValueError, match=f"{name} compares neighboring tokens"):
        generate(model, inputs, ENDS[name])


@torch.no_grad()
def test_a_watermark_over_several_tokens(model: Any) -> None:
    """The watermark seed depends on the last tokens of the prompt, including image placeholders."""
    inputs = batch("llava_next", [(60, 160)])
    arguments = {"watermarking_config": WatermarkingConfig(context_width=4)}
    with HiRED(0.0)(model) as run:
        short = generate(model, inputs, arguments)
    assert torch.equal(short, generate(model, masked_full_inputs(model, inputs, run), arguments))
    arguments = {"watermarking_config": WatermarkingConfig(context_width=12)}
    with HiRED(0.0)(model), pytest.raises(ValueError, match="watermarking_config compares neighboring tokens"):
        generate(model, inputs, arguments)
