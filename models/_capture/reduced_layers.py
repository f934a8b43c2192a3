"""Runs the layers of a vision tower on the patches that remain.

Hidden states have the full length between layers: a layer runs on the entries that remain, and each position of a
merged group receives the state of the group. Captured features, CLS tokens, pooling and projectors of the model
therefore stay unchanged. A step inside a layer calls the unmodified layer twice: with an MLP that returns zeros, and,
after the reduction, with an attention that returns zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tokenprune.image import token_dim
from tokenprune.models._capture.hooks import ATTENTION, Tower, capture_signals, replaced_forward, swapped_config
from tokenprune.models._capture.layer_call import LayerCall
from tokenprune.models._capture.patch_reduction import PatchReduction
from tokenprune.models._capture.proportional_attention import FLASH_PROPORTIONAL_KERNEL, PROPORTIONAL_KERNEL
from tokenprune.saliency import resolve_needs


@contextmanager
def reduced_layers(tower: Tower) -> Iterator[None]:
    """Run the layers of a tower on the patches that remain inside the block.

    Args:
        tower: the tower; without `patches`, nothing changes.
    """
    reduction = tower.patches
    if reduction is None:
        yield
        return
    with ExitStack() as undo:
        for index in range(reduction.first, len(tower.layers)):  # later layers can run for signals
            layer: Any = tower.layers[index]
            run = partial(run_reduced_layer, reduction, tower, index, layer.forward)
            undo.enter_context(replaced_forward(layer, run))
            attention = getattr(layer, tower.attention)
            if reduction.is_proportional and hasattr(attention, "config"):
                names = (PROPORTIONAL_KERNEL, FLASH_PROPORTIONAL_KERNEL)
                undo.enter_context(swapped_config(attention, names, tokenprune_reduction=reduction))
        yield


def run_reduced_layer(
    reduction: PatchReduction, tower: Tower, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run one layer on the patches that remain, and return its output with hidden states of the full length.

    Args:
        reduction: the steps inside the tower.
        tower: the tower.
        index: index of the layer.
        forward: its own `forward`.
        args: positional inputs of the layer.
        kwargs: keyword inputs of the layer.

    Raises:
        NotImplementedError: if the layer runs again for gradients.
    """
    layer = tower.layers[index]
    if torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False):
        raise NotImplementedError(
            "a strategy inside the vision tower does not support gradient checkpointing of the tower, which runs "
            "layers again; disable it for the vision tower, or train with the tower in eval()"
        )
    call = LayerCall(layer, forward, tower.attention, reduction.mlp, args, kwargs)
    if index == reduction.first:
        reduction.start_pass(tower, call.hidden)
    remaining, depth = reduction.remaining, len(tower.layers)
    if remaining is None:
        raise RuntimeError(f"layer {index} of the tower ran before layer {reduction.first}, its first step")
    sequence = remaining.gather(call.hidden)
    for step in reduction.list_steps(index, "before"):
        remaining, sequence = reduction.reduce(index, depth, step, sequence, {}, call.find_real(remaining))
    attending = reduction.find_attending(index, remaining)
    if attending is not remaining:  # attention runs on dropped patches, too, which are restored
        sequence = attending.gather(call.hidden)
    reduction.inputs.setdefault(index, []).append(attending)
    steps = reduction.list_steps(index, "inside")
    if not steps and attending is remaining:
        output = call.run(sequence, remaining, reduction.key_bias)
    else:
        kinds = {kind for reducer, _ in steps for kind, _ in resolve_needs(reducer.needs, reduction.attention)}
        with capture_signals(replace(tower, rows_from={}), {index: kinds & ATTENTION}) as captured:
            sequence, length = call.run_attention(sequence, attending, reduction.key_bias)
        if attending is not remaining:
            sequence = remaining.gather(attending.restore(sequence, call.hidden))
        signals = {kind: torch.cat(values, token_dim(kind)) for (kind, _), values in captured.items()}
        for step in steps:
            remaining, sequence = reduction.reduce(index, depth, step, sequence, signals, call.find_real(remaining))
        output = call.run_mlp(sequence, remaining, length)
    if index < reduction.layers:
        reduction.counts.append((remaining.entry.numel(), remaining.index.numel()))
    if index == reduction.layers - 1:
        reduction.passes.append(remaining)
    reduction.previous = call.hidden
    return call.restore(output, remaining)
