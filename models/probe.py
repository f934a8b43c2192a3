"""Captures signals inside a transformers vision tower while it runs, under whatever attention kernel it uses.

Only the attention modules of the chosen layers are touched, and only for the duration of a block: each gets a copy of
its config that names a private entry of transformers' `AttentionInterface`. The entry computes the wanted rows from
queries and keys (after projections, norms and rotary embedding) and then calls the kernel that the user had chosen, so
the tower's output is the unmodified one. Masks are built from the tower's own config and do not change.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenprune.attention import cls_logits, cls_rows, joint_row, received
from tokenprune.image import ROW_SIGNALS, Signal
from tokenprune.layers import resolve_layers

PROBE = "tokenprune_probe"
"""The private name in transformers' attention interface."""
ATTENTION = ROW_SIGNALS | {"keys"}
"""Kinds of signals that are read inside an attention module."""
OUTPUTS = frozenset({"vision_features", "cls_features"})
"""Kinds of signals that are read from the output of a layer."""


def _probed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Record the wanted rows, then delegate to the kernel that the user's config names."""
    probing: Any = module.config
    with torch.no_grad():  # gradient checkpointing and deepcopy need captured tensors to be free of graphs
        probing.tokenprune_record(query.detach(), key.detach(), kwargs.get("scaling"))
    # As in transformers' own modules, "eager" is the function of the modeling file and not in the interface.
    eager = sys.modules[type(module).__module__].eager_attention_forward
    original: Any = probing.tokenprune_original
    module.config = original  # kernels look into it: flash attention reads its own name there
    try:
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(original._attn_implementation, eager)
        return kernel(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = probing


AttentionInterface.register(PROBE, _probed_attention)


def wanted_layers(needs: Iterable[Signal], layers: int, feature_layer: int) -> dict[int, set[str]]:
    """Return the kinds of signals to capture in each layer.

    Args:
        needs: declared signals.
        layers: number of layers of the tower.
        feature_layer: index of the layer whose output the model uses.

    Raises:
        ValueError: if a signal names a layer that the tower does not have.
    """
    wanted: dict[int, set[str]] = {}
    for signal in needs:
        for index in resolve_layers(signal.layer, layers, feature_layer):
            wanted.setdefault(index, set()).add(signal.kind)
    return wanted


@contextmanager
def probe(
    layers: Sequence[nn.Module], wanted: dict[int, set[str]], prefix: int
) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Capture signals while the block runs the vision tower.

    Args:
        layers: the encoder layers of the tower; each has a `self_attn` with a `config`.
        wanted: kinds of signals per layer index.
        prefix: tokens before the visual ones: 1 if the tower has a CLS token, else 0.

    Yields:
        The captured tensors by (kind, layer index), filled while the tower runs. A tower that runs several times (one
        call per image) adds tiles along the first dimension.
    """
    captured: dict[tuple[str, int], Tensor] = {}

    def add(kind: str, index: int, value: Tensor) -> None:
        before = captured.get((kind, index))
        captured[kind, index] = value if before is None else torch.cat([before, value])

    def recorder(index: int, kinds: set[str]) -> Any:
        def record(query: Tensor, key: Tensor, scaling: float | None) -> None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if "cls_attention" in kinds:
                add("cls_attention", index, cls_rows(query, key, scale))
            if "cls_logits" in kinds:
                add("cls_logits", index, cls_logits(query, key, scale))
            if "joint_attention" in kinds:
                add("joint_attention", index, joint_row(query, key))
            if "received_attention" in kinds:
                add("received_attention", index, received(query, key, scale, prefix))
            if "keys" in kinds:
                add("keys", index, key[:, :, prefix:])

        return record

    def feature_hook(index: int, kinds: set[str]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output).detach()
            if "vision_features" in kinds:
                add("vision_features", index, hidden[:, prefix:])
            if "cls_features" in kinds:
                add("cls_features", index, hidden[:, :prefix])

        return hook

    with ExitStack() as undo:
        for index, kinds in wanted.items():
            if kinds & OUTPUTS:
                undo.callback(layers[index].register_forward_hook(feature_hook(index, kinds)).remove)
            if kinds & ATTENTION:
                attention: Any = layers[index].self_attn
                undo.callback(setattr, attention, "config", attention.config)
                config = copy.copy(attention.config)
                config.tokenprune_original = attention.config
                config.tokenprune_record = recorder(index, kinds)
                config._attn_implementation_internal = PROBE  # the property would also write to shared sub-configs
                attention.config = config
        yield captured
