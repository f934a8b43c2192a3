"""The shipped configs of published checkpoints."""

from __future__ import annotations

import pytest

from tokenprune.experiments.bench.architectures import build_meta_model, list_architectures, load_architecture

PARAMETERS = {
    "internvl3-2b": 2_088_957_440,
    "internvl3-8b": 7_944_373_760,
    "llava-1.5-7b": 7_063_427_072,
    "llava-1.5-13b": 13_351_494_656,
    "llava-onevision-0.5b": 893_675_552,
    "llava-onevision-7b": 8_030_807_584,
    "llava-v1.6-mistral-7b": 7_566_747_648,
    "llava-v1.6-vicuna-7b": 7_063_431_168,
    "llava-v1.6-vicuna-13b": 13_351_499_776,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
}
"""Parameters of the published checkpoints; a tied head counts once (sources: docs/explanation/benchmark-method.md)."""


def test_all_architectures_are_tested() -> None:
    assert list_architectures() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_equal_the_checkpoint(name: str) -> None:
    model = build_meta_model(load_architecture(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_layers_can_be_cut() -> None:
    full = build_meta_model(load_architecture("llava-onevision-0.5b"))
    cut = build_meta_model(load_architecture("llava-onevision-0.5b", 3))
    assert len(cut.model.language_model.layers) == 3
    layer = sum(parameter.numel() for parameter in full.model.language_model.layers[0].parameters())
    total = sum(parameter.numel() for parameter in cut.parameters())
    assert total == PARAMETERS["llava-onevision-0.5b"] - 21 * layer


@pytest.mark.parametrize("layers", [0, 33])
def test_an_invalid_number_of_layers_raises(layers: int) -> None:
    with pytest.raises(ValueError, match="has 32 LLM layers"):
        load_architecture("llava-1.5-7b", layers)


def test_unknown_architectures_name_a_similar_architecture() -> None:
    with pytest.raises(LookupError, match=r"Did you mean llava-v1\.6-vicuna-7b"):
        load_architecture("llava-1.6-vicuna-7b")
