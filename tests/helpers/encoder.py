"""Oracle of reduction inside the vision tower: the full sequence, with hidden keys and frozen states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tests.helpers.families import FAMILIES
from tokenprune.adapter import Adapter, Encoding, find_adapter
from tokenprune.encoder.patches import RemainingPatches
from tokenprune.encoder_reducer import EncoderReducer, PatchDropReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.models._capture.hooks import find_kernel, replaced_forward, swapped_config
from tokenprune.models._capture.patch_reduction import PatchReduction

SINGLE = {"phi4_multimodal"}
"""Families whose models create float32 tensors and raise an error in float64."""
HIDING_KERNEL = "tokenprune_test_hiding"


@dataclass
class LargestPatches(PatchDropReducer):
    """Keeps the patches with the largest states, at two layers."""

    schedule: tuple[tuple[int | float, int | float], ...] = ((1, 0.7), (2, 0.4))

    def score(self, image: EncodedImage) -> Tensor:
        return image.features.float().norm(dim=-1)


@dataclass
class LargestPatchesBefore(LargestPatches):
    """Drops patches before a layer instead of between its attention and its MLP."""

    acts = "before"


@cache
def load(name: str) -> tuple[Any, Any]:
    """Return a tiny model of a family in float64, and inputs with four images in three of four rows."""
    family = FAMILIES[name]
    return family.model(torch.float64 if name not in SINGLE else torch.float32), prepare(name, *family.rows)


def prepare(name: str, *rows: Any, first: int = 0) -> Any:
    """Return inputs of prompt rows in the dtype of the model of `load`."""
    inputs = FAMILIES[name].batch(*rows, first=first)
    if name in SINGLE:
        return inputs
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def encode_reduced(
    model: Any, inputs: Any, reducer: EncoderReducer, needs: Sequence[Signal] = ()
) -> tuple[Encoding, PatchReduction]:
    """Return the encoding of a call with a strategy inside the tower, and the patches that remained."""
    adapter: Any = find_adapter(model)
    reductions = []
    build = adapter.build_patch_reduction

    def store(*args: Any) -> Any:
        reductions.append(build(*args))
        return reductions[-1]

    adapter.build_patch_reduction = store
    with torch.no_grad():
        encoding = adapter.encode(inputs, needs, truncated=True, patch_reducers=[reducer])
    return encoding, reductions[0]


def hide_keys(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kw: Any
) -> Any:
    """Call the original kernel with keys hidden; a call for a part of the sequence takes its part of the mask."""
    state = module.config.tokenprune_hidden
    start = state["start"] if key.shape[2] < state["visible"].shape[1] else 0
    visible = state["visible"][:, start : start + key.shape[2]]
    state["start"] = start + key.shape[2]
    bias = torch.zeros(visible.shape, dtype=query.dtype).masked_fill(~visible, -1e9)[:, None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill(~attention_mask, -1e9)
    return find_kernel(module)(
        module, query, key, value, bias if attention_mask is None else bias + attention_mask, **kw
    )


AttentionInterface.register(HIDING_KERNEL, hide_keys)


def full_mask(adapter: Any, remaining: RemainingPatches) -> Tensor:
    """Return the mask of remaining positions in the sequence of the tower, CLS included, bool `[tiles, length]`."""
    cls = torch.ones(len(remaining.index), int(adapter.has_cls), dtype=torch.bool)
    parts = [cls, remaining.mask]
    return torch.cat(parts[::-1] if adapter.cls == "last" else parts, dim=1)


@contextmanager
def hidden_patches(adapter: Any, reduction: PatchReduction, acts: str) -> Iterator[None]:
    """Run the full tower with hidden keys, and with states of dropped patches frozen, inside the block."""
    layers = adapter.tower_layers
    last = reduction.layers - 1  # layers after it run for signals only
    states: Mapping[int, RemainingPatches] = {n: passes[0] for n, passes in reduction.inputs.items() if n <= last}
    with ExitStack() as undo:
        for index, before in states.items():
            attention = getattr(layers[index], adapter.attention_name)
            visible = full_mask(adapter, before)
            next_state = reduction.passes[0] if index == last else states[index + 1]
            after = visible if acts == "before" else full_mask(adapter, next_state)
            if hasattr(attention, "config"):
                hidden = {"visible": visible, "start": 0}
                undo.enter_context(swapped_config(attention, (HIDING_KERNEL,) * 2, tokenprune_hidden=hidden))
            else:

                def mask_keys(module: nn.Module, args: Any, kwargs: Any, visible: Tensor = visible) -> Any:
                    bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e9)[:, None, None]
                    return args, {**kwargs, "attn_mask": bias}

                undo.callback(attention.register_forward_pre_hook(mask_keys, with_kwargs=True).remove)

            def freeze(*args: Any, forward: Any = layers[index].forward, after: Tensor = after, **kwargs: Any) -> Any:
                source, output = args[0] if args else next(iter(kwargs.values())), forward(*args, **kwargs)
                states = output[0] if isinstance(output, tuple) else output
                kept = after[..., None] if source.dim() == 3 else after[0][:, None]
                frozen = torch.where(kept, states, source)
                return (frozen, *output[1:]) if isinstance(output, tuple) else frozen

            undo.enter_context(replaced_forward(layers[index], freeze))
        yield


def encode_hidden(model: Any, inputs: Any, reduction: PatchReduction) -> list[Tensor]:
    """Return the visual tokens of the full tower with hidden keys, `[length, dim]` per image."""
    adapter: Adapter = find_adapter(model)
    with hidden_patches(adapter, reduction, reduction.reducers[0].acts), torch.no_grad():
        return adapter.encode(inputs, ()).packed
