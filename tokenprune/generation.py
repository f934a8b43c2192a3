"""Calls transformers' `generate` on a reduced prompt, with arguments and results that refer to the full prompt.

Length limits, streamers, stopping criteria, logits processors and returned sequences refer to the full prompt.
`docs/reference/generate-arguments.md` lists every argument and how it is supported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
)
from transformers.utils.generic import ModelOutput

from tokenprune.rewrite import Rows

LENGTHS = ("min_length", "max_length", "prompt_length_to_skip", "begin_index", "regulation_start")
"""Attributes of transformers' own logits processors and stopping criteria that count prompt tokens."""


def generate_reduced(
    generate: Callable[..., Any],
    inputs: Mapping[str, Any],
    generation_config: Any,
    default_config: Any,
    prompt: Tensor | None,
    rows: Rows,
) -> Any:
    """Generate from a reduced prompt, and return the result in terms of the full prompt.

    Args:
        generate: the model's own `generate`.
        inputs: the keyword arguments of `generate`, with the reduced prompt.
        generation_config: the generation config of the call, or None.
        default_config: the generation config of the model.
        prompt: the ids of the full prompt, `[rows, length]`; None if the prompt was passed as embeddings, for which
            `generate` returns new tokens only.
        rows: the kept positions of the prompt.

    Returns:
        The result of `generate`; sequences begin with the full prompt.

    Raises:
        ValueError: for `token_healing`, for a `max_length` within the prompt, and for options that compare neighboring
            tokens if dropping image tokens changed which text tokens are adjacent.
    """
    inputs, width = dict(inputs), rows.index.shape[1]
    options = GenerateOptions(inputs, generation_config, default_config)
    if options.get("token_healing"):
        raise ValueError(
            "token_healing rewrites the prompt as text, and the ids of a reduced prompt do not represent a text; "
            "remove it, or set budget=1.0"
        )
    inputs, generation_config = _with_lower_limits(inputs, generation_config, options, rows)
    if prompt is None:
        return generate(generation_config=generation_config, **inputs)
    _check_adjacent_text(inputs, options, prompt, rows)
    repeats = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
    for name in ("logits_processor", "stopping_criteria"):
        if inputs.get(name) is not None:
            functions = list(inputs[name])
            unique = [f for i, f in enumerate(functions) if f not in functions[:i]]  # as `generate` does
            inputs[name] = type(inputs[name])([_adapt_function(f, prompt, rows, repeats) for f in unique])
    if inputs.get("prefix_allowed_tokens_fn") is not None:
        inputs["prefix_allowed_tokens_fn"] = _FullPromptPrefix(inputs["prefix_allowed_tokens_fn"], prompt, width)
    if inputs.get("streamer") is not None:
        inputs["streamer"] = _FullPromptStreamer(inputs["streamer"], prompt.cpu())
    output = generate(generation_config=generation_config, **inputs)
    if isinstance(output, Tensor):
        return with_full_prompt(output, prompt, width)
    if isinstance(output, ModelOutput) and isinstance(output.get("sequences"), Tensor):
        output["sequences"] = output.sequences = with_full_prompt(output["sequences"], prompt, width)
    return output  # a custom loop may return another type


def check_arguments(inputs: Mapping[str, Any], for_generate: bool, shortens: bool = True) -> None:
    """Raise an error for arguments whose meaning changes if tokens are dropped.

    Args:
        inputs: keyword inputs of `forward` or `generate`.
        for_generate: whether the inputs are for `generate`.
        shortens: whether the prompt is shortened; inside the LLM, tokens are dropped and the prompt is not shortened.

    Raises:
        ValueError: if there is such an argument; the error names it and the action to take.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError(
            "a reduced prompt needs a 2-D attention_mask [rows, length], but this attention_mask is "
            f"{_describe(mask)}; do not pass masks that are prepared for a kernel"
        )
    if inputs.get("shift_labels") is not None:
        raise ValueError(
            "shift_labels are shifted over the full prompt, and a reduced prompt has different neighboring tokens; "
            "pass labels instead"
        )
    if mask is None and positions is not None and bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids that restart without an attention_mask mean packed sequences, which cannot be reduced; "
            "pass one sequence per row with an attention_mask"
        )
    cache = inputs.get("past_key_values") or inputs.get("cache")  # transformers 5.24 renamed it
    if shortens and cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "images cannot be added to a filled cache while a reducer is attached, because the cached prompts are "
            "shorter than the ids; generate from the full conversation without past_key_values"
        )
    if not for_generate:
        return
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name} is not supported below a budget of 100 %, because the second prompt requires its own images; "
                "remove it (guidance_scale then uses the last token), or set budget=1.0"
            )
    if inputs.get("continuous_batching_config") is not None or inputs.get("cache_implementation") == "paged":
        raise ValueError(
            "continuous batching accepts prompts without images only; call generate without it while a reducer is "
            "attached"
        )


def with_full_prompt(sequences: Tensor, prompt: Tensor, width: int) -> Tensor:
    """Return generated sequences with the full prompt in place of the reduced prompt, `[rows * repeats, length]`.

    Args:
        sequences: ids that begin with the reduced prompt, `[rows * repeats, width + new]`.
        prompt: ids of the full prompt, `[rows, length]`.
        width: width of the reduced prompt.
    """
    repeats = len(sequences) // len(prompt)
    return torch.cat([prompt.to(sequences.device).repeat_interleave(repeats, dim=0), sequences[:, width:]], dim=1)


def _describe(value: Any) -> str:
    return f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class GenerateOptions:
    """The options of one call: its arguments, then its generation config, then the generation config of the model.

    Args:
        inputs: keyword arguments of `generate`.
        configs: generation configs in order of precedence; None is skipped.
    """

    def __init__(self, inputs: Mapping[str, Any], *configs: Any) -> None:
        self._inputs = dict(inputs)
        self._configs = [config for config in configs if config is not None]

    def get(self, name: str) -> Any:
        """Return the value of an option, or None if it is not set."""
        if name in self._inputs:
            return self._inputs[name]
        values = (getattr(config, name, None) for config in self._configs)
        return next((value for value in values if value is not None), None)


def _with_lower_limits(
    inputs: dict[str, Any], generation_config: Any, options: GenerateOptions, rows: Rows
) -> tuple[dict[str, Any], Any]:
    """Return inputs and generation config with total length limits lowered by the dropped width.

    `max_new_tokens` does not change.

    Raises:
        ValueError: if the full prompt is at least as long as `max_length`.
    """
    lowered = {}
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if options.get(total) is not None and options.get(new) is None:
            lowered[total] = max(options.get(total) - rows.length + rows.index.shape[1], 0)
    if "max_length" in lowered and options.get("max_length") <= rows.length:
        raise ValueError(
            f"the prompt has {rows.length} tokens before reduction, but max_length={options.get('max_length')} counts "
            "prompt and new tokens; raise max_length or, better, set max_new_tokens"
        )
    in_config = {name: value for name, value in lowered.items() if name not in inputs}
    inputs.update({name: value for name, value in lowered.items() if name in inputs})
    if in_config and generation_config is not None:
        generation_config = copy.deepcopy(generation_config)
        generation_config.update(**in_config)
    else:
        inputs.update(in_config)
    return inputs, generation_config


def _check_adjacent_text(inputs: Mapping[str, Any], options: GenerateOptions, prompt: Tensor, rows: Rows) -> None:
    """Raise an error for options that compare neighboring tokens, if the full and the reduced prompt differ in them.

    They differ if no token of an image is kept, or if a prompt ends with an image. Image tokens are never generated, so
    n-grams that contain image tokens are ignored.

    Args:
        inputs: keyword arguments of `generate`, with the reduced prompt.
        options: the options of the call.
        prompt: ids of the full prompt, `[rows, length]`.
        rows: the kept positions of the prompt.

    Raises:
        ValueError: if an option is affected; the error names it.
    """
    ngrams, sequences, tails = _compared_lengths(inputs, options)
    if not (ngrams or sequences or tails):
        return
    for full, short, dropped in _prompt_pairs(inputs["input_ids"], prompt, rows):
        for name, length in tails.items():
            if full[-length:] != short[-length:]:
                raise ValueError(_adjacency_error(name))
        for name, length in {**ngrams, **sequences}.items():
            if _text_tail(full, length - 1, dropped) != _text_tail(short, length - 1, dropped):
                raise ValueError(_adjacency_error(name))
        for name, length in ngrams.items():
            if _continuations(full, length, dropped) != _continuations(short, length, dropped):
                raise ValueError(_adjacency_error(name))


def _adjacency_error(name: str) -> str:
    return (
        f"{name} compares neighboring tokens of the prompt, and dropping image tokens made other tokens adjacent; "
        f"remove {name}, or set a budget that keeps more tokens of each image"
    )


def _compared_lengths(
    inputs: Mapping[str, Any], options: GenerateOptions
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return the lengths of compared n-grams, of compared text, and of the end of the prompt that is compared exactly.

    Each mapping has the names of options and numbers of tokens. If the caller passes a processor or criterion of
    transformers, it counts as the option that creates it.
    """
    functions = [f for name in ("logits_processor", "stopping_criteria") for f in inputs.get(name) or ()]

    def values(option: str, kind: type, attribute: str) -> list[Any]:
        """Return the values of an option: the option itself, and equivalent processors or criteria."""
        passed = [getattr(function, attribute) for function in functions if type(function) is kind]
        return [value for value in (options.get(option), *passed) if value]

    biases = values("sequence_bias", SequenceBiasLogitsProcessor, "sequence_bias")
    words = values("bad_words_ids", NoBadWordsLogitsProcessor, "bad_word_ids")
    texts = values("stop_strings", StopStringCriteria, "stop_strings")
    ngrams = {
        "no_repeat_ngram_size": values("no_repeat_ngram_size", NoRepeatNGramLogitsProcessor, "ngram_size"),
        "encoder_no_repeat_ngram_size": values(
            "encoder_no_repeat_ngram_size", EncoderNoRepeatNGramLogitsProcessor, "ngram_size"
        ),
    }
    sequences = {
        "sequence_bias": [len(ids if isinstance(value, Mapping) else ids[0]) for value in biases for ids in value],
        "bad_words_ids": [len(ids) for value in words for ids in value],
        "stop_strings": [  # a token has at least one byte
            len(text.encode()) for value in texts for text in ([value] if isinstance(value, str) else value)
        ],
    }
    watermark = options.get("watermarking_config")
    tails = {
        "watermarking_config": [] if watermark is None else [getattr(watermark, "context_width", 1)],
        "guidance_scale": [1] if options.get("guidance_scale") not in (None, 1) else [],
    }
    longest = ({name: max(value) for name, value in group.items() if value} for group in (ngrams, sequences, tails))
    return next(longest), next(longest), next(longest)


def _prompt_pairs(short: Tensor, prompt: Tensor, rows: Rows) -> Iterator[tuple[list[int], list[int], set[int]]]:
    """Yield the ids of each full prompt, the ids of its reduced prompt, and the set of padding and dropped ids."""
    kept = torch.zeros_like(prompt).scatter_add(1, rows.index.to(prompt.device), rows.mask.long().to(prompt.device))
    dropped = prompt.masked_fill(kept > 0, -1)
    padding = short.masked_fill(rows.mask.to(short.device), -1)
    for row in range(len(prompt)):
        yield prompt[row].tolist(), short[row].tolist(), {*dropped[row].tolist(), *padding[row].tolist()} - {-1}


def _text_tail(ids: Sequence[int], length: int, dropped: set[int]) -> list[int]:
    """Return the last ids of a prompt, at most `length`, after all images and padding."""
    tail = list(ids[max(len(ids) - length, 0) :])
    images = [position for position, token in enumerate(tail) if token in dropped]
    return tail[images[-1] + 1 :] if images else tail


def _continuations(ids: Sequence[int], size: int, dropped: set[int]) -> set[tuple[int, tuple[int, ...]]]:
    """Return the continuations of the end of a prompt that complete an n-gram of the prompt.

    Args:
        ids: the prompt.
        size: length of the n-grams.
        dropped: ids that are never generated; continuations with such an id are not included.

    Returns:
        Pairs of the number of last tokens of the prompt that begin an n-gram, and the remaining tokens of this n-gram.
        For 0 last tokens, these are all n-grams.
    """
    grams = {tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)}
    tails = [tuple(ids[len(ids) - length :]) for length in range(size)]
    ends = {(len(tail), gram[len(tail) :]) for tail in tails for gram in grams if gram[: len(tail)] == tail}
    return {(length, end) for length, end in ends if dropped.isdisjoint(end)}


def _is_from_transformers(function: Any) -> bool:
    return type(function).__module__.startswith("transformers.")


def _adapt_function(function: Any, prompt: Tensor, rows: Rows, repeats: int) -> Any:
    """Return a processor or criterion with the same effect on the reduced prompt as `function` on the full prompt.

    transformers replaces its default processors and criteria by objects of the caller with the same type. Therefore,
    objects of its own classes keep their type and get lower lengths. Other objects are wrapped to read the full
    prompt.

    Args:
        function: a logits processor or a stopping criterion.
        prompt: ids of the full prompt, `[rows, length]`.
        rows: the kept positions of the prompt.
        repeats: number of sequences of each row.
    """
    width = rows.index.shape[1]
    if not _is_from_transformers(function):
        kind = _FullPromptCriterion if isinstance(function, StoppingCriteria) else _FullPromptProcessor
        return kind(function, prompt, width)
    attributes: dict[str, Any] = {
        name: value - rows.length + width for name in LENGTHS if isinstance(value := getattr(function, name, None), int)
    }
    if getattr(function, "prompt_ignore_length", None) is not None:
        attributes["prompt_ignore_length"] = _ignored_length(function.prompt_ignore_length, rows, repeats)
    if isinstance(function, PrefixConstrainedLogitsProcessor):
        prefix = function._prefix_allowed_tokens_fn
        attributes["_prefix_allowed_tokens_fn"] = _FullPromptPrefix(prefix, prompt, width)
    if attributes:
        function = copy.copy(function)
        for name, value in attributes.items():
            setattr(function, name, value)
    return function


def _ignored_length(length: int | Tensor, rows: Rows, repeats: int) -> int | Tensor:
    """Return the number of positions of the reduced prompt before a position of the full prompt.

    Args:
        length: the position in the full prompt, an int for all rows or a tensor `[rows * repeats]`.
        rows: the kept positions of the prompt.
        repeats: number of sequences of each row.

    Returns:
        An int if `length` is an int and all rows have the same result; else a number for each row, `[rows * repeats]`.
    """
    lengths = torch.as_tensor(length, device=rows.index.device)
    lengths = lengths.expand(len(rows.index) * repeats) if lengths.dim() == 0 else lengths
    expanded = [v.repeat_interleave(len(lengths) // len(rows.index), dim=0) for v in (rows.index, rows.mask)]
    after = expanded[1] & (expanded[0] >= lengths[:, None])
    past = rows.index.shape[1] + (lengths - rows.length).clamp(min=0)
    columns = torch.where(after.any(dim=1), after.int().argmax(dim=1), past)
    return int(columns[0]) if isinstance(length, int) and bool((columns == columns[0]).all()) else columns


class _FullPrompt:
    """Base class of wrappers that call a function with the full prompt in place of the reduced prompt.

    Args:
        function: the wrapped object of the caller; its attributes are attributes of the wrapper.
        prompt: ids of the full prompt, `[rows, length]`.
        width: width of the reduced prompt.
    """

    def __init__(self, function: Any, prompt: Tensor, width: int) -> None:
        self.function, self.prompt, self.width = function, prompt, width

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped object."""
        if name in ("function", "prompt", "width"):  # not yet set in a copy
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
        """Return the mask of finished rows, bool `[rows]`."""
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
    """A streamer that receives the full prompt in place of the reduced prompt.

    Args:
        streamer: the streamer of the caller.
        prompt: ids of the full prompt, `[rows, length]`.
    """

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        """Pass tokens to the streamer of the caller; the first call passes the full prompt."""
        self.streamer.put(value if self.prompt is None else self.prompt)
        self.prompt = None

    def end(self) -> None:
        """Pass the end of the sequence to the streamer of the caller."""
        self.streamer.end()
