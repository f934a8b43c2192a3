"""Captures signals inside a transformers vision tower while it runs, under whatever attention kernel it uses.

Only the attention modules of the chosen layers are touched, and only for the duration of a block: each gets a copy of
its config that names a private entry of transformers' `AttentionInterface`. The entry computes the wanted rows from
queries and keys (after projections, norms and rotary embedding) and then calls the kernel that the user had chosen, so
the tower's output is the unmodified one. Masks are built from the tower's own config and do not change.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from tokenprune.image import ROW_SIGNALS, Signal
from tokenprune.layers import resolve_layers
from tokenprune.models._capture.attention import cls_logits, cls_rows, joint_row, received

PROBE, FLASH_PROBE = "tokenprune_probe", "tokenprune_flash_probe"
"""The private names in transformers' attention interface; a module with "flash" in its kernel's name passes all images
at once."""
ATTENTION = (ROW_SIGNALS | {"keys"}) - {"pooling_attention"}
"""Kinds of signals that are read inside an attention module of a layer."""
OUTPUTS = frozenset({"vision_features", "cls_features"})
"""Kinds of signals that are read from the output of a layer."""


def _probed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Record the wanted rows, then delegate to the kernel that the user's config names."""
    probing: Any = module.config
    with torch.no_grad():  # gradient checkpointing and deepcopy need captured tensors to be free of graphs
        lengths = None if kwargs.get("cu_seq_lens_q") is None else kwargs["cu_seq_lens_q"].diff().tolist()
        probing.tokenprune_record(query.detach(), key.detach(), kwargs.get("scaling"), attention_mask, lengths)
    return _own_kernel(module)(module, query, key, value, attention_mask, **kwargs)


def _own_kernel(module: nn.Module) -> Callable[..., Any]:
    """Return the kernel that the user's config names, for an attention module whose config was exchanged."""
    exchanged: Any = module.config
    # As in transformers' own modules, "eager" is the function of the modeling file and not in the interface.
    names = vars(sys.modules[type(module).__module__])
    own = ("vision_eager_attention_forward", "simple_eager_attention_forward")  # of Llama 4 and Phi-4, which have two
    eager = next((names[name] for name in own if name in names), None) or names["eager_attention_forward"]
    original: Any = exchanged.tokenprune_original

    def kernel(*args: Any, **kwargs: Any) -> Any:
        module.config = original  # kernels look into it: flash attention reads its own name there
        try:
            return ALL_ATTENTION_FUNCTIONS.get_interface(original._attn_implementation, eager)(*args, **kwargs)
        finally:
            module.config = exchanged

    return kernel


@contextmanager
def swapped_config(attention: Any, names: tuple[str, str], **entries: Any) -> Iterator[None]:
    """Let an attention module call a private kernel while the block runs.

    Args:
        attention: the attention module; it has a `config`.
        names: the kernel's names, the second where the user's own is a flash kernel.
        entries: what the kernel finds in the module's config.
    """
    original = attention.config
    config = copy.copy(original)
    config.tokenprune_original = original
    for name, value in entries.items():
        setattr(config, name, value)
    # The property would also write to shared sub-configs.
    config._attn_implementation_internal = names[is_flash_attention_requested(original)]
    attention.config = config
    try:
        yield
    finally:
        attention.config = original


AttentionInterface.register(PROBE, _probed_attention)
AttentionInterface.register(FLASH_PROBE, _probed_attention)


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


@dataclass(frozen=True)
class Tower:
    """Where in a vision tower signals are found.

    Args:
        layers: its encoder layers.
        attention: name of the attention module in a layer; it has a `config`.
        cls: where the CLS token stands in the sequence, if there is one.
        segments: tokens of each image, where the tower runs over all images as one sequence; None if its first
            dimension is tiles.
        rows_from: for a layer, the one whose attention rows are read in its place; itself if it is not named.
        pooling: the attention of a head that pools the tokens of a tile with a learned probe, if there is one.
    """

    layers: Sequence[nn.Module]
    attention: str = "self_attn"
    cls: Literal["none", "first", "last"] = "none"
    segments: Sequence[int] | None = None
    rows_from: Mapping[int, int] = field(default_factory=dict)
    pooling: nn.MultiheadAttention | None = None

    @property
    def prefix(self) -> int:
        """Tokens before the visual ones, after `in_order`."""
        return int(self.cls != "none")

    def in_order(self, value: Tensor, dim: int) -> Tensor:
        """Return a tensor with the CLS token first."""
        return value.roll(1, dim) if self.cls == "last" else value

    def split_by_image(self, value: Tensor, dim: int, lengths: Sequence[int] | None = None) -> list[Tensor]:
        """Return the images of one sequence apart; anything else whole.

        Args:
            value: a tensor along the sequence.
            dim: its dimension that is the sequence.
            lengths: the parts that the kernel was told to keep apart, if it was.
        """
        parts = self.segments if lengths is None else lengths
        together = parts is not None and len(value) == 1 and value.shape[dim] == sum(parts)
        return list(value.split(list(parts or ()), dim)) if together else [value]


@contextmanager
def capture_signals(tower: Tower, wanted: dict[int, set[str]]) -> Iterator[dict[tuple[str, int], list[Tensor]]]:
    """Capture signals while the block runs the vision tower.

    Args:
        tower: the tower.
        wanted: kinds of signals per layer index.

    Yields:
        The captured tensors by (kind, layer index), filled while the tower runs: one more in the list for each time
        that the layer runs, or for each image where all are one sequence. Their first dimension is tiles.
    """
    captured: dict[tuple[str, int], list[Tensor]] = {}

    def add(kind: str, index: int, value: Tensor) -> None:
        captured.setdefault((kind, index), []).append(value)

    def recorder(index: int, kinds: set[str]) -> Any:
        def record(
            query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None, lengths: Sequence[int] | None
        ) -> None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            queries, keys = (tower.split_by_image(tower.in_order(one, 2), 2, lengths) for one in (query, key))
            real = None if mask is None or len(queries) > 1 else tower.in_order(real_positions(mask), 1)
            for q, k in zip(queries, keys, strict=True):
                if "cls_attention" in kinds:
                    add("cls_attention", index, cls_rows(q, k, scale, real))
                if "cls_logits" in kinds:
                    add("cls_logits", index, cls_logits(q, k, scale))
                if "joint_attention" in kinds:
                    add("joint_attention", index, joint_row(q, k))
                if "received_attention" in kinds:
                    add("received_attention", index, received(q, k, scale, tower.prefix, real))
                if "keys" in kinds:
                    add("keys", index, k[:, :, k.shape[2] - q.shape[2] + tower.prefix :])

        return record

    def feature_hook(index: int, kinds: set[str]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output).detach()
            hidden = hidden[None] if hidden.dim() == 2 else hidden
            for one in tower.split_by_image(tower.in_order(hidden, 1), 1):
                if "vision_features" in kinds:
                    add("vision_features", index, one[:, tower.prefix :])
                if "cls_features" in kinds:
                    add("cls_features", index, one[:, : tower.prefix])

        return hook

    pooled = [index for index, kinds in wanted.items() if "pooling_attention" in kinds]

    def by_head(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def pooling_hook(module: nn.Module, args: Any, output: Any) -> None:
        for index in pooled:
            add("pooling_attention", index, output[1][:, :, 0].detach().float())

    torch_kernel = _TorchKernel()
    with ExitStack() as undo:
        if pooled and tower.pooling is not None:
            undo.callback(tower.pooling.register_forward_pre_hook(by_head, with_kwargs=True).remove)
            undo.callback(tower.pooling.register_forward_hook(pooling_hook).remove)
        for index, kinds in wanted.items():
            if kinds & OUTPUTS:
                undo.callback(tower.layers[index].register_forward_hook(feature_hook(index, kinds)).remove)
            places: dict[int, set[str]] = {}
            for kind in kinds & ATTENTION:
                at = tower.rows_from.get(index, index) if kind in ROW_SIGNALS else index
                places.setdefault(at, set()).add(kind)
            for at, read in places.items():  # a layer that is read twice is wrapped twice
                attention: Any = getattr(tower.layers[at], tower.attention)
                if hasattr(attention, "fused_attn"):  # timm's: it does not ask transformers' interface
                    expect = partial(torch_kernel.expect, recorder(index, read))
                    undo.callback(attention.register_forward_pre_hook(expect).remove)
                    continue
                record = recorder(index, read)
                undo.enter_context(swapped_config(attention, (PROBE, FLASH_PROBE), tokenprune_record=record))
        if any(hasattr(getattr(layer, tower.attention, None), "fused_attn") for layer in tower.layers):
            undo.enter_context(torch_kernel)
        yield captured


class _TorchKernel(TorchFunctionMode):
    """Records queries and keys where an expected module calls torch's attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def expect(self, record: Any, module: Any, args: Any) -> None:
        """Note what is to be recorded in a module that runs next.

        Raises:
            ValueError: if the module writes its full attention map out instead.
        """
        if not module.fused_attn:
            raise ValueError("attention of a timm tower is read where it calls torch's fused kernel; set fused_attn")
        self.records.append(record)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.records:
            named = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **given}
            records, self.records = self.records, []
            with torch.no_grad():
                for record in records:
                    query, key = named["query"].detach(), named["key"].detach()
                    record(query, key, named.get("scale"), named.get("attn_mask"), None)
        return func(*args, **given)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the `forward` of a module inside the block.

    Args:
        module: the module.
        forward: the function that runs instead.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def real_positions(mask: Tensor) -> Tensor:
    """Return which positions of a sequence are no padding, bool `[tiles, length]`.

    Args:
        mask: an attention mask as kernels take it: `[tiles, length]`, or `[tiles, 1, queries, keys]` as bool or as
            what is added to the logits.
    """
    if mask.dim() == 2:
        return mask.bool()
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.flatten(1, 2).any(dim=1)
