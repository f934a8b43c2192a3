"""Calls transformers' `generate` on a reduced prompt so that its caller meets only the full one.

Length limits, streamers, stopping criteria, logits processors and returned sequences refer to the full prompt.
`docs/generate-arguments.md` lists every argument.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from tokenprune.rewrite import Rows

LENGTHS = ("min_length", "max_length", "prompt_length_to_skip", "begin_index", "regulation_start")
"""Attributes of transformers' own processors and criteria that count prompt tokens."""


def generate_reduced(
    generate: Callable[..., Any],
    inputs: Mapping[str, Any],
    generation_config: Any,
    default_config: Any,
    prompt: Tensor | None,
    rows: Rows,
) -> Any:
    """Generate from a reduced prompt, and return the result as if it came from the full one.

    Args:
        generate: the model's own `generate`.
        inputs: its keyword arguments, with the prompt reduced.
        generation_config: the generation config of the call, or None.
        default_config: the generation config of the model.
        prompt: the ids of the full prompt, `[rows, length]`; None if it was given as embeddings, where `generate`
            returns new tokens only.
        rows: the positions that remain.

    Returns:
        The result of `generate`; sequences begin with the full prompt.

    Raises:
        ValueError: for `token_healing`.
    """
    config = default_config if generation_config is None else generation_config
    if inputs.get("token_healing", getattr(config, "token_healing", False)):
        raise ValueError(
            "token_healing rewrites the prompt as text, and the ids of a reduced prompt are not those of a text; "
            "leave it out, or set budget=1.0"
        )
    dropped, width = rows.length - rows.index.shape[1], rows.index.shape[1]
    inputs, generation_config = _with_lower_limits(dict(inputs), generation_config, config, dropped)
    if prompt is None:
        return generate(generation_config=generation_config, **inputs)
    for name in ("logits_processor", "stopping_criteria"):
        if inputs.get(name) is not None:
            functions = [_for_reduced_prompt(function, prompt, width, dropped) for function in inputs[name]]
            inputs[name] = type(inputs[name])(functions)
    if inputs.get("prefix_allowed_tokens_fn") is not None:
        inputs["prefix_allowed_tokens_fn"] = _FullPromptPrefix(inputs["prefix_allowed_tokens_fn"], prompt, width)
    if inputs.get("streamer") is not None:
        inputs["streamer"] = _FullPromptStreamer(inputs["streamer"], prompt.cpu())
    output = generate(generation_config=generation_config, **inputs)
    if isinstance(output, Tensor):
        return with_full_prompt(output, prompt, width)
    output["sequences"] = output.sequences = with_full_prompt(output.sequences, prompt, width)
    return output


def refuse_arguments(inputs: Mapping[str, Any], generating: bool) -> None:
    """Raise for arguments whose meaning would change on a reduced prompt.

    Args:
        inputs: keyword inputs of `forward` or `generate`.
        generating: whether they go to `generate`.

    Raises:
        ValueError: naming the argument and what to do.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError(
            "a reduced prompt needs a 2-D attention_mask [rows, length], and this one is "
            f"{_describe(mask)}; leave masks that are prepared for a kernel out"
        )
    if mask is None and positions is not None and bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids that restart without an attention_mask mean packed sequences; these cannot be reduced. "
            "Give one sequence per row with an attention_mask"
        )
    cache = inputs.get("past_key_values") or inputs.get("cache")  # renamed in transformers 5.24
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "images cannot be added to a filled cache while a reducer is attached: the cache holds shorter prompts "
            "than the ids say. Generate from the whole conversation without past_key_values"
        )
    if not generating:
        return
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name} is not supported below a budget of 100 %: the second prompt would need its own images; "
                "leave it out (guidance_scale then uses the last token), or set budget=1.0"
            )
    if inputs.get("continuous_batching_config") is not None or inputs.get("cache_implementation") == "paged":
        raise ValueError(
            "continuous batching takes prompts without images; call generate without it while a reducer is attached"
        )


def with_full_prompt(sequences: Tensor, prompt: Tensor, width: int) -> Tensor:
    """Return generated sequences with the reduced prompt replaced by the full one, `[rows * repeats, length]`.

    Args:
        sequences: ids that begin with the reduced prompt, `[rows * repeats, width + new]`.
        prompt: ids of the full prompt, `[rows, length]`.
        width: width of the reduced prompt.
    """
    repeats = len(sequences) // len(prompt)
    return torch.cat([prompt.to(sequences.device).repeat_interleave(repeats, dim=0), sequences[:, width:]], dim=1)


def _describe(value: Any) -> str:
    return f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _with_lower_limits(
    inputs: dict[str, Any], generation_config: Any, config: Any, dropped: int
) -> tuple[dict[str, Any], Any]:
    """Lower total length limits by the dropped width, wherever they are set; `max_new_tokens` stays."""
    lowered = {}
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if inputs.get(total) is not None:
            inputs[total] -= dropped
        elif inputs.get(new, getattr(config, new, None)) is None and getattr(config, total, None):
            lowered[total] = getattr(config, total) - dropped
    if lowered and generation_config is not None:
        generation_config = copy.deepcopy(generation_config)
        generation_config.update(**lowered)
    elif lowered:
        inputs.update(lowered)
    return inputs, generation_config


def _for_reduced_prompt(function: Any, prompt: Tensor, width: int, dropped: int) -> Any:
    """Return a processor or criterion that behaves on the reduced prompt as it would on the full one.

    transformers replaces its default processors and criteria by those of the caller that have the same type. So its own
    classes keep their type and get lower lengths; classes of the caller are wrapped and read the full prompt.

    Args:
        function: a logits processor or a stopping criterion.
        prompt: ids of the full prompt, `[rows, length]`.
        width: width of the reduced prompt.
        dropped: positions that the prompt lost.
    """
    if type(function).__module__.startswith("transformers."):
        lengths = {name: value - dropped for name in LENGTHS if isinstance(value := getattr(function, name, None), int)}
        if not lengths:
            return function
        function = copy.copy(function)
        for name, value in lengths.items():
            setattr(function, name, value)
        return function
    if isinstance(function, StoppingCriteria):
        return _FullPromptCriterion(function, prompt, width)
    return _FullPromptProcessor(function, prompt, width)


class _FullPrompt:
    """Base of wrappers that pass ids with the full prompt instead of the reduced one.

    Args:
        function: the wrapped object of the caller; its attributes are read through.
        prompt: ids of the full prompt, `[rows, length]`.
        width: width of the reduced prompt.
    """

    def __init__(self, function: Any, prompt: Tensor, width: int) -> None:
        self.function, self.prompt, self.width = function, prompt, width

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped object."""
        if name in ("function", "prompt", "width"):  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.function, name)


class _FullPromptProcessor(_FullPrompt, LogitsProcessor):
    """A logits processor that reads the full prompt."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Return the processed scores, `[rows, vocabulary]`."""
        return self.function(with_full_prompt(input_ids, self.prompt, self.width), scores)


class _FullPromptCriterion(_FullPrompt, StoppingCriteria):
    """A stopping criterion that reads the full prompt."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return which rows are finished, bool `[rows]`."""
        return self.function(with_full_prompt(input_ids, self.prompt, self.width), scores, **kwargs)


class _FullPromptPrefix(_FullPrompt):
    """A `prefix_allowed_tokens_fn` that reads the full prompt."""

    def __call__(self, row: int, input_ids: Tensor) -> Sequence[int]:
        """Return the allowed next tokens of one row."""
        allowed: Sequence[int] = self.function(
            row, torch.cat([self.prompt[row].to(input_ids.device), input_ids[self.width :]])
        )
        return allowed


class _FullPromptStreamer:
    """A streamer that gets the full prompt.

    Args:
        streamer: the streamer of the caller.
        prompt: ids of the full prompt, `[rows, length]`.
    """

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        """Pass tokens on; the first ones are the prompt."""
        self.streamer.put(value if self.prompt is None else self.prompt)
        self.prompt = None

    def end(self) -> None:
        """Pass the end on."""
        self.streamer.end()
