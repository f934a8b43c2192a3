"""Captures signals inside a transformers vision tower while it runs, with any attention kernel.

Inside a block, the attention modules of the required layers get a copy of their config that names a private kernel in
transformers' `AttentionInterface`. The private kernel computes the required rows from queries and keys (after
projections, norms and rotary embedding). It then calls the kernel of the original config, so the output of the tower
does not change. Masks are built from the config of the tower and do not change either.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from tokenprune.image import ROW_SIGNALS, Signal
from tokenprune.layers import resolve_layers
from tokenprune.models._capture.attention import cls_logits, cls_rows, joint_row, received_attention

if TYPE_CHECKING:
    from tokenprune.models._capture.patch_reduction import PatchReduction

CAPTURE_KERNEL, FLASH_CAPTURE_KERNEL = "tokenprune_capture", "tokenprune_flash_capture"
"""Private names in transformers' attention interface. If the name of its kernel contains "flash", a module passes all
images in one call."""
ATTENTION = (ROW_SIGNALS | {"keys"}) - {"pooling_attention"}
"""Kinds of signals that are captured inside an attention module of a layer."""
OUTPUTS = frozenset({"vision_features", "cls_features"})
"""Kinds of signals that are captured from the output of a layer."""
CAPTURE_CONTEXT: ContextVar[Callable[[], AbstractContextManager[Any]]] = ContextVar(
    "capture_context", default=nullcontext
)
"""Creates the context of each capture inside an attention module, without the attention kernel. A profiler sets it to
measure the captures."""


def _capture_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Record the required rows, then call the kernel of the original config."""
    config: Any = module.config
    with torch.no_grad():  # gradient checkpointing and deepcopy need captured tensors to be free of graphs
        lengths = None if kwargs.get("cu_seq_lens_q") is None else kwargs["cu_seq_lens_q"].diff().tolist()
        config.tokenprune_record(query.detach(), key.detach(), kwargs.get("scaling"), attention_mask, lengths)
    return find_kernel(module)(module, query, key, value, attention_mask, **kwargs)


def find_kernel(module: nn.Module) -> Callable[..., Any]:
    """Return the kernel of the original config, for an attention module whose config is swapped."""
    swapped: Any = module.config
    # As in transformers' own modules, "eager" is a function of the modeling file and not in the interface.
    names = vars(sys.modules[type(module).__module__])
    # The modeling files of Llama 4 and Phi-4 have two eager functions: of the vision tower and of the LLM.
    vision_names = ("vision_eager_attention_forward", "simple_eager_attention_forward", "eager_attention_forward")
    eager = next(names[name] for name in getattr(swapped, "tokenprune_eager", vision_names) if name in names)
    original: Any = swapped.tokenprune_original

    def kernel(*args: Any, **kwargs: Any) -> Any:
        module.config = original  # kernels read it: flash attention reads its own name
        try:
            return ALL_ATTENTION_FUNCTIONS.get_interface(original._attn_implementation, eager)(*args, **kwargs)
        finally:
            module.config = swapped

    return kernel


def build_private_config(original: Any, names: tuple[str, str], **entries: Any) -> Any:
    """Return a copy of a config that names a private kernel; `tokenprune_original` is the original config.

    Args:
        original: the config of an attention module.
        names: two names of the private kernel; the second is used if the original kernel is a flash kernel.
        entries: further attributes of the copy, which the private kernel reads.
    """
    config = copy.copy(original)
    config.tokenprune_original = original
    for name, value in entries.items():
        setattr(config, name, value)
    # The property would also write to shared sub-configs.
    config._attn_implementation_internal = names[is_flash_attention_requested(original)]
    return config


@contextmanager
def swapped_config(attention: Any, names: tuple[str, str], **entries: Any) -> Iterator[None]:
    """Swap the config of an attention module inside the block, so that the module calls a private kernel.

    Args:
        attention: the attention module; it has a `config`.
        names: two names of the private kernel; the second is used if the original kernel is a flash kernel.
        entries: attributes of the swapped config, which the private kernel reads.
    """
    original = attention.config
    attention.config = build_private_config(original, names, **entries)
    try:
        yield
    finally:
        attention.config = original


AttentionInterface.register(CAPTURE_KERNEL, _capture_attention)
AttentionInterface.register(FLASH_CAPTURE_KERNEL, _capture_attention)


def resolve_signals(needs: Iterable[Signal], layers: int, feature_layer: int) -> dict[int, set[str]]:
    """Return the kinds of signals to capture per layer index.

    Args:
        needs: declared signals.
        layers: number of layers of the tower.
        feature_layer: index of the layer whose output the model uses.

    Raises:
        ValueError: if a signal names a layer that the tower does not have.
    """
    kinds_by_layer: dict[int, set[str]] = {}
    for signal in needs:
        for index in resolve_layers(signal.layer, layers, feature_layer):
            kinds_by_layer.setdefault(index, set()).add(signal.kind)
    return kinds_by_layer


@dataclass(frozen=True)
class Tower:
    """The modules and the sequence layout of a vision tower from which signals are captured.

    Args:
        layers: its encoder layers.
        attention: name of the attention module in a layer; it has a `config`.
        cls: position of the CLS token in the sequence, or ``"none"``.
        segments: number of tokens of each image, if the tower runs over all images as one sequence; None if the first
            dimension is tiles.
        rows_from: index of the layer whose attention rows are captured for a layer, by layer index; missing layers use
            their own rows.
        pooling: the attention of a head that pools the tokens of a tile with a learned query; None without such a head.
        patches: the steps of strategies inside the tower; None without such a strategy.
    """

    layers: Sequence[nn.Module]
    attention: str = "self_attn"
    cls: Literal["none", "first", "last"] = "none"
    segments: Sequence[int] | None = None
    rows_from: Mapping[int, int] = field(default_factory=dict)
    pooling: nn.MultiheadAttention | None = None
    patches: PatchReduction | None = None

    @property
    def prefix(self) -> int:
        """Number of tokens before the visual tokens, after `with_cls_first`."""
        return int(self.cls != "none")

    def with_cls_first(self, value: Tensor, dim: int) -> Tensor:
        """Return a tensor with the CLS token first."""
        return value.roll(1, dim) if self.cls == "last" else value

    def split_by_image(self, value: Tensor, dim: int, lengths: Sequence[int] | None = None) -> list[Tensor]:
        """Return one tensor per image if the value is one sequence of all images; otherwise the value in a list.

        Args:
            value: a tensor with a sequence dimension.
            dim: the sequence dimension.
            lengths: sequence lengths that the kernel received; None if it received none.
        """
        reduced = None if self.patches is None or self.segments is None else self.patches.lengths
        parts = (reduced or self.segments) if lengths is None else lengths
        is_joined = parts is not None and len(value) == 1 and value.shape[dim] == sum(parts)
        return list(value.split(list(parts or ()), dim)) if is_joined else [value]


def _in_capture_context(record: Callable[..., None]) -> Callable[..., None]:
    """Return a function that runs ``record`` inside a context from `CAPTURE_CONTEXT`; in a compiled graph, without."""

    def record_in_context(*args: Any) -> None:
        with nullcontext() if torch.compiler.is_compiling() else CAPTURE_CONTEXT.get()():
            record(*args)

    return record_in_context


@contextmanager
def capture_signals(tower: Tower, kinds_by_layer: dict[int, set[str]]) -> Iterator[dict[tuple[str, int], list[Tensor]]]:
    """Capture signals while the block runs the vision tower.

    Args:
        tower: the tower.
        kinds_by_layer: kinds of signals per layer index.

    Yields:
        The captured tensors by (kind, layer index), filled while the tower runs. Each run of a layer adds one tensor to
        the list, or one tensor per image if all images are one sequence. The first dimension is tiles.
    """
    captured: dict[tuple[str, int], list[Tensor]] = {}

    def add(kind: str, index: int, value: Tensor) -> None:
        captured.setdefault((kind, index), []).append(value)

    def recorder(index: int, kinds: set[str]) -> Any:
        @_in_capture_context
        def record(
            query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None, lengths: Sequence[int] | None
        ) -> None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            queries, keys = (tower.split_by_image(tower.with_cls_first(value, 2), 2, lengths) for value in (query, key))
            real = None if mask is None or len(queries) > 1 else tower.with_cls_first(real_positions(mask), 1)
            bias = None if tower.patches is None else tower.patches.key_bias
            bias = None if bias is None else tower.with_cls_first(bias, 1)
            for q, k in zip(queries, keys, strict=True):
                if "cls_attention" in kinds:
                    add("cls_attention", index, cls_rows(q, k, scale, real, bias))
                if "cls_logits" in kinds:
                    add("cls_logits", index, cls_logits(q, k, scale, bias))
                if "joint_attention" in kinds:
                    add("joint_attention", index, joint_row(q, k))
                if "received_attention" in kinds:
                    add("received_attention", index, received_attention(q, k, scale, tower.prefix, real, bias=bias))
                if "keys" in kinds:
                    add("keys", index, k[:, :, k.shape[2] - q.shape[2] + tower.prefix :])

        return record

    def feature_hook(index: int, kinds: set[str]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output).detach()
            hidden = hidden[None] if hidden.dim() == 2 else hidden
            for states in tower.split_by_image(tower.with_cls_first(hidden, 1), 1):
                if "vision_features" in kinds:
                    add("vision_features", index, states[:, tower.prefix :])
                if "cls_features" in kinds:
                    add("cls_features", index, states[:, : tower.prefix])

        return hook

    pooling_layers = [index for index, kinds in kinds_by_layer.items() if "pooling_attention" in kinds]

    def request_weights(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def pooling_hook(module: nn.Module, args: Any, output: Any) -> None:
        for index in pooling_layers:
            add("pooling_attention", index, output[1][:, :, 0].detach().float())

    torch_capture = _TorchAttentionCapture()
    with ExitStack() as undo:
        if pooling_layers and tower.pooling is not None:
            undo.callback(tower.pooling.register_forward_pre_hook(request_weights, with_kwargs=True).remove)
            undo.callback(tower.pooling.register_forward_hook(pooling_hook).remove)
        for index, kinds in kinds_by_layer.items():
            if kinds & OUTPUTS:
                undo.callback(tower.layers[index].register_forward_hook(feature_hook(index, kinds)).remove)
            kinds_by_source: dict[int, set[str]] = {}
            for kind in kinds & ATTENTION:
                source = tower.rows_from.get(index, index) if kind in ROW_SIGNALS else index
                kinds_by_source.setdefault(source, set()).add(kind)
            for source, source_kinds in kinds_by_source.items():  # a layer with two recorders is wrapped twice
                attention: Any = getattr(tower.layers[source], tower.attention)
                if hasattr(attention, "fused_attn"):  # timm's module does not use transformers' interface
                    expect = partial(torch_capture.expect, recorder(index, source_kinds))
                    undo.callback(attention.register_forward_pre_hook(expect).remove)
                    continue
                record = recorder(index, source_kinds)
                undo.enter_context(
                    swapped_config(attention, (CAPTURE_KERNEL, FLASH_CAPTURE_KERNEL), tokenprune_record=record)
                )
        if any(hasattr(getattr(layer, tower.attention, None), "fused_attn") for layer in tower.layers):
            undo.enter_context(torch_capture)
        yield captured


class _TorchAttentionCapture(TorchFunctionMode):
    """Records queries and keys of the next call of torch's attention function by an expected module."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def expect(self, record: Any, module: Any, args: Any) -> None:
        """Add a recorder for the module that runs next.

        Raises:
            ValueError: if the module does not call the fused kernel, but computes its full attention map.
        """
        if not module.fused_attn:
            raise ValueError(
                "signals of a timm tower are captured in calls of torch's fused attention kernel; set fused_attn"
            )
        self.records.append(record)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.records:
            arguments = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **keywords}
            records, self.records = self.records, []
            with torch.no_grad():
                for record in records:
                    query, key = arguments["query"].detach(), arguments["key"].detach()
                    record(query, key, arguments.get("scale"), arguments.get("attn_mask"), None)
        return func(*args, **keywords)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the `forward` of a module inside the block.

    Args:
        module: the module.
        forward: the function that replaces it.
    """
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def real_positions(mask: Tensor) -> Tensor:
    """Return the positions of a sequence that are not padding, bool `[tiles, length]`.

    Args:
        mask: an attention mask as kernels take it: `[tiles, length]`, or `[tiles, 1, queries, keys]`, either bool or
            added to the logits.
    """
    if mask.dim() == 2:
        return mask.bool()
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.flatten(1, 2).any(dim=1)
