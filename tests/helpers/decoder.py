"""Oracles of reduction inside the LLM: the unmodified model with a mask per layer, and strategies with cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.families import FAMILIES, REPRESENTATIVES
from tokenprune.adapter import find_adapter
from tokenprune.caches import find_cache
from tokenprune.cuts import Cut
from tokenprune.decoder_reducer import DecoderReducer
from tokenprune.image import EncodedImage
from tokenprune.reducer import ScoreReducer
from tokenprune.run import Run
from tokenprune.testing.families.base import Family

NEW = 6
"""Number of new tokens."""


@dataclass
class LargestStates(DecoderReducer, ScoreReducer):
    """Keeps the tokens with the largest hidden states at one cut."""

    budget: Any = 0.3
    layer: int | float = 1

    def score(self, image: EncodedImage) -> Tensor:
        """Return the norm of the hidden states, `[tiles, tokens]`."""
        return image.features.norm(dim=-1)


@dataclass
class LargestStatesTwice(LargestStates):
    """Keeps the tokens with the largest hidden states at two cuts."""

    schedule: tuple[tuple[int, float], ...] = ((2, 0.6), (4, 0.3))

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The two cuts."""
        return tuple(Cut(layer, budget) for layer, budget in self.schedule)


def deepen(family: Family, layers: int = 6, **settings: Any) -> Family:
    """Return a family whose LLM has more layers; lists of layer types repeat.

    Args:
        family: the family.
        layers: number of layers.
        settings: more entries of the config of the LLM.
    """

    @cache
    def build_example() -> Any:
        model = family.model()
        config = copy.deepcopy(model.config)
        text = config.get_text_config()
        count = text.num_hidden_layers
        for name in ("layer_types", "no_rope_layers"):
            types = getattr(text, name, None)
            if types and name not in settings:
                setattr(text, name, (list(types) * layers)[:layers])
        text.num_hidden_layers = layers
        for name, value in settings.items():
            setattr(text, name, value)
        torch.manual_seed(0)
        deep = type(model)._from_config(config, attn_implementation=family.attn)
        weights = model.state_dict()
        with torch.no_grad():
            for name, parameter in deep.named_parameters():
                parts = name.split(".")
                for place, part in enumerate(parts):
                    if part.isdigit() and parts[place - 1] == "layers" and int(part) >= count:
                        parts[place] = str(int(part) % count)
                source = weights.get(".".join(parts))
                if source is not None and source.shape == parameter.shape:
                    # `Family.model` multiplies the weights by these factors again
                    factor = family.scale if parameter.dim() >= 2 else 1.0
                    parameter.copy_(source / factor)
            deep.get_output_embeddings().weight.div_(10.0)
        return deep

    return replace(family, name=f"{family.name}, {layers} layers", example=build_example)


@cache
def load_model(name: str, layers: int = 0) -> Any:
    """Return the tiny model of a family, which all tests of a file share.

    Args:
        name: name of the family.
        layers: number of LLM layers; 0 means as in the family.
    """
    family = deepen(FAMILIES[name], layers) if layers else FAMILIES[name]
    return family.model()


@cache
def load_inputs(name: str) -> Any:
    """Return inputs of four left-padded rows with one image, two, none, and one."""
    family = FAMILIES[name]
    return family.batch(*family.rows)


def combine(step: int, *values: Sequence[str]) -> list[Any]:
    """Return all combinations of values as test parameters; one of `step` runs by default, the others are slow.

    The default ones are spread evenly: each value occurs, and neighbors differ in all values.
    """
    ranked = [enumerate(sorted(axis, key=lambda value: value not in REPRESENTATIVES)) for axis in values]
    return [
        pytest.param(*(value for _, value in case), marks=[pytest.mark.slow] if sum(n for n, _ in case) % step else [])
        for case in product(*ranked)
    ]


def visible_masks(model: Any, inputs: Any, run: Run) -> list[tuple[int, Tensor]]:
    """Return the first layer and the visible positions of the prompt that enters the LLM of each cut of the last call.

    Args:
        model: the model.
        inputs: the inputs of the full prompt.
        run: the record of one call.
    """
    rows = run.rows
    assert rows is not None
    placeholders = find_adapter(model).placeholders(inputs)[:, -rows.length :]
    visible = rows.mask.clone()
    is_image = placeholders.gather(1, rows.index) & visible
    masks = []
    for cut in run.cuts:
        visible, left = visible.clone(), is_image & visible
        visible[left] = torch.cat([selection.packed_mask() for selection in cut.selections])
        masks.append((cut.layer, visible))
    return masks


@contextmanager
def hook_layers(
    layers: Sequence[Any], masks: Sequence[tuple[int, Tensor]], enter: Callable[[int, Tensor, Any, Any], Any]
) -> Iterator[None]:
    """Change the inputs of the layers behind cuts inside the block.

    Args:
        layers: the decoder layers.
        masks: the first layer and the visible positions of each cut.
        enter: returns the inputs of a layer from its number, the visible positions, and its inputs.
    """
    handles = []
    for number, layer in enumerate(layers):
        visible = next((mask for start, mask in reversed(masks) if start <= number), None)
        if visible is not None:
            handles.append(
                layer.register_forward_pre_hook(
                    lambda module, args, kwargs, number=number, visible=visible: enter(number, visible, args, kwargs),
                    with_kwargs=True,
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hide_dropped(model: Any, masks: Sequence[tuple[int, Tensor]]) -> Iterator[None]:
    """Hide positions of the sequence in each layer of an unmodified model; a hidden position sees only itself.

    Args:
        model: the model.
        masks: the first layer and the visible positions of the sequence, bool `[rows, length]`, of each cut. Later
            positions of the sequence are visible.
    """
    layers = find_adapter(model).decoder.layers  # type: ignore[attr-defined]

    def enter(number: int, visible: Tensor, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows, queries = hidden.shape[:2]
        attention = getattr(layers[number], "self_attn", None)
        assert attention is not None, "convolutions cannot be masked"
        cache, mask = find_cache(kwargs), kwargs.get("attention_mask")
        layer = None if cache is None or len(cache.layers) <= attention.layer_idx else cache.layers[attention.layer_idx]
        past = 0 if layer is None else int(layer.get_seq_length())
        if mask is None:
            keys, offset = past + queries, 0
            mask = torch.ones(1, 1, keys, keys, dtype=torch.bool).tril()[:, :, -queries:]
        else:
            offset = 0 if layer is None else int(layer.get_mask_sizes(queries)[1])
        places = torch.arange(mask.shape[-1]) + offset
        hide = ~visible.repeat_interleave(rows // len(visible), dim=0)
        hide = torch.nn.functional.pad(hide, (0, max(0, int(places[-1]) + 1 - hide.shape[1])))[:, places]
        is_itself = places == (torch.arange(queries) + past)[:, None]
        hide = hide[:, None, None, :] & ~is_itself
        value = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.expand(rows, *mask.shape[1:]).masked_fill(hide, value)}

    with hook_layers(layers, masks, enter):
        yield


def generate_logits(model: Any, inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the generated ids and the logits of all steps, `[rows, length]` and `[steps, rows, vocabulary]`."""
    torch.manual_seed(0)
    defaults = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "suppress_tokens": [find_adapter(model).image_token_id],
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    output = model.generate(**inputs, **{**defaults, **options})
    return output.sequences, torch.stack(output.logits)


class OperatorCounter(TorchDispatchMode):
    """Counts the operators inside the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run an operator."""
        self.count += 1
        return func(*args, **(kwargs or {}))
