"""Every argument of `generate` and `forward` is supported, refused with an error message, or not available."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    WatermarkingConfig,
)

from tests.helpers.generation import LENGTH, NEW, RecordingProcessor, generate, image_token, masked_full_inputs
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, tiny_model

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "generate-arguments.md"
SAMPLE: Mapping[str, Any] = {"do_sample": True, "num_return_sequences": 2}
SUPPORTED: Mapping[str, Mapping[str, Any]] = {
    "assistant_confidence_threshold": {"assistant_model": "itself", "assistant_confidence_threshold": 0.3},
    "assistant_ensemble_weight": {"assistant_model": "itself", "assistant_ensemble_weight": 0.5},
    "assistant_lookbehind": {"assistant_model": "itself", "assistant_lookbehind": 10},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(100))},
    "bos_token_id": {"bos_token_id": 1},
    "cache_config": {"cache_config": None},
    "cache_implementation": {"cache_implementation": "static"},
    "compile_config": {"compile_config": CompileConfig(backend="eager")},
    "decoder_start_token_id": {"decoder_start_token_id": 1},
    "disable_compile": {"disable_compile": True, "cache_implementation": "static"},
    "do_sample": SAMPLE,
    "early_stopping": {"early_stopping": True, "num_beams": 3},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "eos_token_id": {"eos_token_id": list(range(3, 200))},
    "epsilon_cutoff": {**SAMPLE, "epsilon_cutoff": 3e-3},
    "eta_cutoff": {**SAMPLE, "eta_cutoff": 3e-3},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 1.5)},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 2, "max_new_tokens": None, "max_length": (LENGTH, 3)},
    "guidance_scale": {"guidance_scale": 1.5},
    "is_assistant": {"is_assistant": False},
    "length_penalty": {"length_penalty": 2.0, "num_beams": 3},
    "max_cache_len": {"cache_implementation": "static", "max_cache_len": 400},
    "max_length": {"max_new_tokens": None, "max_length": (LENGTH, 3)},
    "max_matching_ngram_size": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
    "max_new_tokens": {"max_new_tokens": 2},
    "max_time": {"max_time": 1000.0},
    "min_length": {"min_length": (LENGTH, 3), "eos_token_id": list(range(3, 200))},
    "min_new_tokens": {"min_new_tokens": 3, "eos_token_id": list(range(3, 200))},
    "min_p": {**SAMPLE, "min_p": 0.2},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "max_new_tokens": 8},
    "num_assistant_tokens": {"assistant_model": "itself", "num_assistant_tokens": 2},
    "num_assistant_tokens_schedule": {"assistant_model": "itself", "num_assistant_tokens_schedule": "constant"},
    "num_beams": {"num_beams": 3, "num_return_sequences": 2},
    "num_return_sequences": {**SAMPLE, "num_return_sequences": 3},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True, "num_beams": 2},
    "pad_token_id": {"pad_token_id": 3, "eos_token_id": list(range(3, 200))},
    "prefill_chunk_size": {"prefill_chunk_size": 7},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True, "num_beams": 3},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "sequence_bias": {"sequence_bias": [[[5], 30.0]]},
    "stop_strings": {"stop_strings": ["e", "o"], "tokenizer": "of the model"},
    "suppress_tokens": {"suppress_tokens": list(range(200))},
    "target_lookbehind": {"assistant_model": "itself", "target_lookbehind": 10},
    "temperature": {**SAMPLE, "temperature": 0.5},
    "top_h": {**SAMPLE, "top_h": 0.4},
    "top_k": {**SAMPLE, "top_k": 3},
    "top_p": {**SAMPLE, "top_p": 0.5},
    "typical_p": {**SAMPLE, "typical_p": 0.5},
    "use_cache": {"use_cache": False},
    "watermarking_config": {"watermarking_config": WatermarkingConfig()},
}
"""Fields of `GenerationConfig`, each with arguments that use it."""
REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "token_healing": ({"token_healing": True, "tokenizer": "of the model"}, "token_healing rewrites the prompt"),
}
"""Fields that are refused below 100 %, with arguments and the start of the error message."""
NOT_AVAILABLE: Mapping[str, Mapping[str, Any]] = {
    "assistant_early_exit": {"assistant_early_exit": 1},
    "constraints": {"constraints": [], "force_words_ids": [[5]], "num_beams": 2},
    "continuous_batching_config": {},
    "diversity_penalty": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "dola_layers": {"dola_layers": "low"},
    "force_words_ids": {"force_words_ids": [[5]], "num_beams": 2},
    "low_memory": {"penalty_alpha": 0.6, "top_k": 4, "low_memory": True},
    "num_beam_groups": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "speculation_type": {},
    "use_mtp": {"use_mtp": True},
}
"""Fields that the unmodified model refuses, or that do nothing for it; transformers moved some to hub repositories."""
INTERNAL = {"_from_model_config", "transformers_version"}
"""Fields that are not options."""
PARAMETERS = {
    "inputs": "supported",
    "generation_config": "supported",
    "logits_processor": "supported",
    "stopping_criteria": "supported",
    "prefix_allowed_tokens_fn": "supported",
    "synced_gpus": "supported",
    "assistant_model": "supported",
    "streamer": "supported",
    "negative_prompt_ids": "refused",
    "negative_prompt_attention_mask": "refused",
    "custom_generate": "supported",
    "kwargs": "supported",
}
"""Parameters of `generate`."""
FORWARD = {
    "input_ids": "supported",
    "pixel_values": "supported",
    "image_sizes": "supported",
    "attention_mask": "supported",
    "position_ids": "supported",
    "cache": "refused",
    "past_key_values": "refused",
    "inputs_embeds": "supported",
    "vision_feature_layer": "supported",
    "vision_feature_select_strategy": "refused",
    "labels": "supported",
    "use_cache": "supported",
    "logits_to_keep": "supported",
    "mm_encoder_outputs": "supported",
    "return_dict": "supported",
    "output_attentions": "supported",
    "output_hidden_states": "supported",
    "kwargs": "supported",
}
"""Parameters of `forward` of LLaVA-NeXT, and options that it passes on."""


def test_every_field_is_classified() -> None:
    classified = [*SUPPORTED, *REFUSED, *NOT_AVAILABLE, *INTERNAL]
    assert sorted(classified) == sorted(vars(GenerationConfig()))


def test_every_parameter_is_classified(model: Any) -> None:
    assert list(PARAMETERS) == list(inspect.signature(type(model).generate).parameters)[1:]
    options = {"return_dict", "output_attentions", "output_hidden_states", "past_key_values"}
    assert set(FORWARD) - options == set(inspect.signature(type(model).forward).parameters) - {"self"} - options


def test_the_documentation_lists_every_argument() -> None:
    text = PAGE.read_text()
    rows = {
        **dict.fromkeys(SUPPORTED, "supported"),
        **dict.fromkeys(REFUSED, "refused"),
        **dict.fromkeys(NOT_AVAILABLE, "not available"),
        **PARAMETERS,
        **FORWARD,
    }
    missing = [f"| `{name}` | {state} |" for name, state in rows.items() if f"| `{name}` | {state} |" not in text]
    assert not missing


@pytest.mark.parametrize("name", SUPPORTED)
@torch.no_grad()
def test_supported(model: Any, name: str) -> None:
    is_speculative = "assistant_model" in SUPPORTED[name] or "prompt_lookup_num_tokens" in SUPPORTED[name]
    inputs = batch("llava_next", [(60, 160)], *([] if is_speculative else [[(112, 112)]]))
    before = generate(model, inputs, SUPPORTED[name])
    with HiRED(1.0)(model):
        assert torch.equal(generate(model, inputs, SUPPORTED[name]), before)
    with HiRED(0.2)(model) as run:
        short = generate(model, inputs, SUPPORTED[name])
    arguments = {**SUPPORTED[name], "prefill_chunk_size": None}
    if is_speculative:  # speculation does not change greedy decoding
        arguments = {}
    assert torch.equal(short, generate(model, masked_full_inputs(model, inputs, run), arguments))


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_refused(model: Any, inputs: Any, name: str) -> None:
    arguments, message = REFUSED[name]
    with HiRED(0.2)(model):
        with pytest.raises(ValueError, match=message):
            generate(model, inputs, arguments)
        config = GenerationConfig(**{name: arguments[name]}, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, generation_config=config)


@pytest.mark.parametrize("name", [name for name, arguments in NOT_AVAILABLE.items() if arguments])
@torch.no_grad()
def test_not_available(model: Any, name: str) -> None:
    inputs = batch("llava_next", [(60, 160)])
    with pytest.raises((ValueError, OSError, TypeError, AttributeError, RuntimeError, NotImplementedError)):
        generate(model, inputs, NOT_AVAILABLE[name])


@pytest.mark.parametrize("source", ["argument", "config", "model", "model with another config"])
@pytest.mark.parametrize("embedded", [False, True])
@torch.no_grad()
def test_total_lengths(inputs: Any, source: str, embedded: bool) -> None:
    """Limits of arguments, configs and models count the full prompt."""
    model = tiny_model("llava_next")
    model.generation_config.pad_token_id = 0
    total = inputs["input_ids"].shape[1] + 3
    call_inputs = dict(inputs)
    if embedded:
        call_inputs["inputs_embeds"] = model.get_input_embeddings()(call_inputs.pop("input_ids"))
    arguments: dict[str, Any] = {"max_length": total, "min_length": total} if source == "argument" else {}
    if source == "config":
        arguments["generation_config"] = GenerationConfig(max_length=total, min_length=total, pad_token_id=0)
    if source == "model with another config":
        arguments["generation_config"] = GenerationConfig(do_sample=False, pad_token_id=0)
    if source.startswith("model"):
        model.generation_config.max_length = model.generation_config.min_length = total
    arguments["suppress_tokens"] = [image_token()]
    plain = model.generate(**call_inputs, **arguments)
    with HiRED(0.2)(model):
        reduced = model.generate(**call_inputs, **arguments)
    assert reduced.shape == plain.shape


@torch.no_grad()
def test_the_minimum_length_of_the_model_applies_with_another_config(inputs: Any) -> None:
    model, end_tokens = tiny_model("llava_next"), list(range(3, 400))
    total = inputs["input_ids"].shape[1] + 3
    model.generation_config.min_length = total
    config = GenerationConfig(max_new_tokens=6, pad_token_id=0, eos_token_id=end_tokens)
    plain = model.generate(**inputs, generation_config=config)
    with HiRED(0.2)(model):
        assert model.generate(**inputs, generation_config=config).shape == plain.shape == (2, total + 1)
    assert config.min_length is None


@pytest.mark.parametrize("below", [0, 10])
def test_a_length_within_the_prompt_is_refused(model: Any, inputs: Any, below: int) -> None:
    """The error is raised as without a strategy, and reports the length of the full prompt."""
    length = inputs["input_ids"].shape[1]
    with HiRED(0.2)(model), pytest.raises(ValueError, match=f"has {length} tokens .* max_length={length - below} "):
        model.generate(**inputs, max_length=length - below)


@torch.no_grad()
def test_scores_equal_the_oracle(model: Any, inputs: Any) -> None:
    modes: list[dict[str, Any]] = [{}, {"num_beams": 3, "num_return_sequences": 2}]
    for mode in modes:
        options = {**mode, "max_new_tokens": NEW, "suppress_tokens": [image_token()]}
        options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        with HiRED(0.2)(model) as run:
            short = model.generate(**inputs, **options)
        full = model.generate(**masked_full_inputs(model, inputs, run), **options)
        assert torch.equal(short.sequences, full.sequences)
        for name in ("scores", "logits"):
            for a, b in zip(short[name], full[name], strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        steps = [model.compute_transition_scores(o.sequences, o.scores, o.get("beam_indices")) for o in (short, full)]
        torch.testing.assert_close(*steps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [0.2, 1.0])
@torch.no_grad()
def test_positional_arguments(model: Any, inputs: Any, budget: float) -> None:
    config, image_inputs = GenerationConfig(max_new_tokens=2, pad_token_id=0), dict(inputs)
    ids = image_inputs.pop("input_ids")
    with HiRED(budget)(model):
        expected = model.generate(**inputs, generation_config=config)
        processor = RecordingProcessor()
        assert torch.equal(model.generate(ids, config, [processor], **image_inputs), expected)
        assert len(processor.ids) == 2
        assert torch.equal(model.generate(inputs=ids, generation_config=config, **image_inputs), expected)
        with pytest.raises(ValueError, match="`inputs` and `input_ids` are both set"):
            model.generate(ids, **inputs)
        with pytest.raises(TypeError, match="multiple values"):
            model.generate(ids, config, generation_config=config, **image_inputs)


@torch.no_grad()
def test_synced_gpus(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model):
        assert torch.equal(generate(model, inputs, {"synced_gpus": False}), generate(model, inputs, {}))


class RecordingStreamer:
    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.end_count = 0

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.end_count += 1


@pytest.mark.parametrize("mode", ["greedy", "prompt lookup"])
@pytest.mark.parametrize("budget", [0.2, 1.0])
@torch.no_grad()
def test_a_streamer_gets_the_full_prompt_and_the_new_tokens(model: Any, budget: float, mode: str) -> None:
    inputs, streamer = batch("llava_next", [(60, 160)]), RecordingStreamer()
    lookup = {"prompt_lookup_num_tokens": 3} if mode == "prompt lookup" else {}
    with HiRED(budget)(model):
        output = generate(model, inputs, {"streamer": streamer, **lookup})
    assert torch.equal(streamer.values[0], inputs["input_ids"])
    assert torch.equal(torch.cat([value.flatten() for value in streamer.values]), output[0])
    assert streamer.end_count == 1


@pytest.mark.parametrize("name", ["negative_prompt_ids", "negative_prompt_attention_mask"])
def test_negative_prompts_are_refused(model: Any, inputs: Any, name: str) -> None:
    with HiRED(0.2)(model), pytest.raises(ValueError, match=f"{name} is not supported"):
        model.generate(**inputs, guidance_scale=1.5, **{name: inputs["input_ids"]})
