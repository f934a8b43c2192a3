"""Functions of the tests of `generate`: reduced calls and their masked full prompt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tests.helpers.oracle import oracle_inputs_1d
from tokenprune.testing.tiny_models import tiny_model, tokenizer

NEW = 4
"""Default number of new tokens."""
LENGTH = "length of the full prompt plus"
"""Marks a total length in `SUPPORTED`: (LENGTH, n) is the length of the full prompt plus n."""


@cache
def image_token() -> int:
    """Return the id of the image token of the tiny LLaVA-NeXT."""
    return int(tiny_model("llava_next").config.image_token_id)


def resolve(arguments: Mapping[str, Any], model: Any, length: int) -> dict[str, Any]:
    """Return the arguments with actual total lengths and objects in place of their markers."""
    objects = {"itself": model, "of the model": tokenizer()}
    resolved = {}
    for name, value in arguments.items():
        is_length = isinstance(value, tuple) and value[0] == LENGTH
        resolved[name] = (
            length + value[1] if is_length else objects.get(value, value) if isinstance(value, str) else value
        )
    return resolved


def generate(model: Any, inputs: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Return the ids that a call of `generate` with resolved arguments gives, `[rows, length]`."""
    torch.manual_seed(0)
    defaults = {"max_new_tokens": NEW, "suppress_tokens": [image_token()]}
    arguments = {**defaults, **resolve(arguments, model, inputs["input_ids"].shape[1])}
    output = model.generate(**inputs, **{k: v for k, v in arguments.items() if v is not None})
    return output if isinstance(output, Tensor) else output.sequences


def masked_full_inputs(model: Any, inputs: Any, run: Any) -> dict[str, Any]:
    """Return the full prompt with masked dropped positions. `generate` computes the positions."""
    masked = oracle_inputs_1d(model, inputs, run, "reindex")
    masked.pop("position_ids")
    return masked


class Recorder:
    """Stores the ids of every call."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []


class RecordingProcessor(Recorder, LogitsProcessor):
    """A logits processor that stores the ids and changes no score."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids.append(input_ids.clone())
        return scores
