"""Runs the layers of a vision tower on the patches that remain.

Hidden states have the full length between layers: a layer runs on the entries that remain, and each position of a
merged group receives the state of the group. Captured features, CLS tokens, pooling and projectors of the model
therefore stay unchanged. A step inside a layer calls the unmodified layer twice: with an MLP that returns zeros, and,
after the reduction, with an attention that returns zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from tokenprune.encoder.patches import PatchGroups, RemainingPatches
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.geometry import TileGeometry
from tokenprune.image import ROW_SIGNALS, EncodedImage, SignalKey, token_dim
from tokenprune.models._capture.hooks import (
    ATTENTION,
    Tower,
    capture_signals,
    find_kernel,
    real_positions,
    replaced_forward,
    swapped_config,
)
from tokenprune.saliency import resolve_needs, with_cls_substitute

PROPORTIONAL_KERNEL, FLASH_PROPORTIONAL_KERNEL = "tokenprune_proportional", "tokenprune_flash_proportional"
"""Private names in transformers' attention interface; the kernel adds the bias of merged patches to the logits."""
MASKS = ("attention_mask", "attn_mask")
"""Names of the inputs of a layer that mask pairs of positions."""


class PatchReduction:
    """The steps of strategies inside one tower, and the patches that remain while it runs.

    Args:
        reducers: the strategies, in the order of their stages.
        mlp: name of the MLP in a layer of the tower.
        layers: number of layers that run.
        attention: the kind of signal that replaces CLS attention.
        entering: positions in the sequence of the patches of each image that enter the first layer, `[kept]` each; None
            if all patches enter. Only for towers that run over all images as one sequence.
    """

    def __init__(
        self,
        reducers: Sequence[EncoderReducer],
        mlp: str,
        layers: int,
        attention: str,
        entering: Sequence[Tensor] | None = None,
    ) -> None:
        self.reducers, self.mlp, self.layers, self.attention = tuple(reducers), mlp, layers, attention
        self.entering = entering
        self.previous: Tensor | None = None
        """Hidden states that entered the last layer that ran, `[tiles, length, width]`; None before a pass."""
        self.attending: RemainingPatches | None = None
        """Patches on which attention runs before `attending_end`, also dropped ones; None without such layers."""
        self.attending_end = 0
        """The first layer whose attention runs on the remaining patches only."""
        self.remaining: RemainingPatches | None = None
        """The patches that remain in the pass in progress; None before the first layer with a step."""
        self.passes: list[RemainingPatches] = []
        """The patches that remained at the end of each pass through the tower."""
        self.lengths: list[int] = []
        """Number of remaining patches of each segment of the sequence; one segment if the first dimension is tiles."""
        self.inputs: dict[int, list[RemainingPatches]] = {}
        """The patches on which the attention of each layer ran, one entry per pass."""
        self.counts: list[tuple[int, int]] = []
        """Patches of each layer that ran, summed over tiles: without reduction, and in the MLP of the layer."""
        self._steps: dict[int, list[tuple[EncoderReducer, list[int]]]] = {}

    @property
    def first(self) -> int:
        """Index of the first layer with a step, or of the layer before it that the step reads.

        A new pass through the tower begins there.
        """
        if self.entering is not None:
            return 0
        return min(
            min(reducer.list_steps(2, self.layers), default=self.layers) - int(reducer.reads_change)
            for reducer in self.reducers
        )

    @property
    def is_proportional(self) -> bool:
        """Whether a strategy requires that attention counts merged patches as often as their patches."""
        return any(reducer.proportional_attention for reducer in self.reducers)

    @property
    def key_bias(self) -> Tensor | None:
        """The bias on the keys of merged patches in the layer that runs, `[tiles, length]`; None without a bias."""
        return self.remaining.key_bias if self.is_proportional and self.remaining is not None else None

    def start_pass(self, tower: Tower, hidden: Tensor) -> None:
        """Read the steps of a pass through the tower.

        Args:
            tower: the tower.
            hidden: hidden states that enter the first layer with a step, `[tiles, length, width]`.
        """
        patches = hidden.shape[1] - int(tower.cls != "none")
        self.lengths = [patches] if tower.segments is None else list(tower.segments)
        self.remaining = RemainingPatches.all(len(hidden), patches, tower.cls, hidden.device)
        if self.entering is not None:
            self.lengths = [len(index) for index in self.entering]
            self.remaining = self.remaining.narrow(PatchGroups(torch.cat(list(self.entering))[None]))
        self._steps, self.previous, self.attending = {}, None, None
        for reducer in self.reducers:
            numbers = [reducer.list_steps(length, self.layers) for length in self.lengths]
            for layer in numbers[0]:
                self._steps.setdefault(layer, []).append((reducer, [steps[layer] for steps in numbers]))

    def list_steps(self, layer: int, acts: str) -> list[tuple[EncoderReducer, list[int]]]:
        """Return the steps of a layer that reduce patches: the strategy, and the patches of each segment after it.

        Args:
            layer: index of the layer.
            acts: ``"inside"`` or ``"before"`` the layer.
        """
        steps = [step for step in self._steps.get(layer, ()) if step[0].acts == acts]
        return [(reducer, numbers) for reducer, numbers in steps if numbers != self.lengths]

    def reduce(
        self,
        layer: int,
        depth: int,
        step: tuple[EncoderReducer, list[int]],
        sequence: Tensor,
        signals: Mapping[str, Tensor],
        real: Tensor | None,
    ) -> Tensor:
        """Return the sequence after a step, `[tiles, length, width]`, and update the patches that remain.

        Args:
            layer: index of the layer.
            depth: number of layers of the tower.
            step: the strategy, and the number of patches of each segment after the step.
            sequence: hidden states of the remaining entries, `[tiles, length, width]`.
            signals: signals of the layer by kind, over the remaining patches of all segments.
            real: entries that are not padding, bool `[tiles, length]`; None means all entries.
        """
        if self.remaining is None:
            raise RuntimeError("a step inside the tower runs before its pass has started")
        reducer, numbers = step
        cls_token, patches = self.remaining.split_cls(sequence)
        if reducer.reads_change and self.previous is not None:
            change = patches - self.remaining.split_cls(self.remaining.gather(self.previous))[1]
            signals = {**signals, "state_change": change}
        is_real = None if real is None else self.remaining.split_cls(real[..., None])[1][..., 0]
        parts: list[PatchGroups] = []
        for number, (start, length) in zip(numbers, list_segments(self.lengths), strict=True):
            captured: dict[SignalKey, Tensor] = {
                (kind, layer): value.narrow(token_dim(kind), start, length) for kind, value in signals.items()
            }
            features = patches[:, start : start + length]
            captured["vision_features", layer] = features
            if cls_token.shape[1]:
                captured["cls_features", layer] = cls_token
            geometry = find_geometry(len(features), length)
            if is_real is not None:
                geometry = geometry.restrict(is_real[:, start : start + length].flatten().cpu())
            image = EncodedImage(geometry, features, captured, layers=depth, feature_layer=layer)
            image = with_cls_substitute(image, reducer.needs, self.attention)
            parts.append(reducer.group_checked(image, min(number, length)))
        groups = parts[0] if len(parts) == 1 else join_groups(parts, self.lengths)
        self.lengths = [part.kept.shape[1] for part in parts]
        if reducer.full_attention_layers:
            self.attending, self.attending_end = self.remaining, layer + reducer.full_attention_layers
        self.remaining, sequence = self.remaining.apply(groups, sequence)
        return sequence

    def find_attending(self, layer: int, remaining: RemainingPatches) -> RemainingPatches:
        """Return the patches on which the attention of a layer runs.

        Args:
            layer: index of the layer.
            remaining: the patches that remain.
        """
        return remaining if self.attending is None or layer >= self.attending_end else self.attending

    def expand_captured(
        self, tower: Tower, captured: Mapping[SignalKey, list[Tensor]]
    ) -> dict[SignalKey, list[Tensor]]:
        """Return captured tensors over all patches, after the tower has run.

        Rows of attention are zero at patches without an entry. All patches of a group share their key.

        Args:
            tower: the tower.
            captured: the captured tensors by kind and layer index.
        """
        expanded: dict[SignalKey, list[Tensor]] = {}
        for (kind, layer), values in captured.items():
            source = tower.rows_from.get(layer, layer) if kind in ROW_SIGNALS else layer
            states, dim = self.inputs.get(source), token_dim(kind)
            if kind not in ATTENTION or states is None:
                expanded[kind, layer] = values
                continue
            parts = values if tower.segments is None else [torch.cat(values, dim)]
            fill = -torch.inf if kind == "cls_logits" else 0.0
            expanded[kind, layer] = [
                state.expand_rows(value, dim, fill) if kind in ROW_SIGNALS else state.expand_groups(value, dim)
                for state, value in zip(states, parts, strict=True)
            ]
        return expanded

    def read_mask(self) -> list[Tensor]:
        """Return the mask of the patches with a state after the tower has run, bool `[tiles, patches]` per pass."""
        return [state.restored_mask for state in self.passes]


@lru_cache(maxsize=256)
def find_geometry(tiles: int, patches: int) -> TileGeometry:
    """Return the layout of tiles of equally many patches side by side, each a single row.

    Args:
        tiles: number of tiles.
        patches: number of patches of a tile.
    """
    with torch.inference_mode(False):  # a later call may record gradients
        grid = (1, tiles - 1) if tiles > 1 else (0, 0)
        return TileGeometry(grid, (1, patches), torch.zeros(tiles - 1, 4), torch.arange(tiles * patches))


def list_segments(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the start and the length of consecutive segments.

    Args:
        lengths: the length of each segment.
    """
    return [(sum(lengths[:number]), length) for number, length in enumerate(lengths)]


def join_groups(parts: Sequence[PatchGroups], lengths: Sequence[int]) -> PatchGroups:
    """Return the groups of several segments as groups of one sequence; nothing is merged.

    Segments with fewer neighbors than others get -1 as further neighbors.

    Args:
        parts: the groups of each segment.
        lengths: the length of each segment.
    """
    starts = [start for start, _ in list_segments(lengths)]
    kept = torch.cat([part.kept + start for part, start in zip(parts, starts, strict=True)], dim=1)
    numbers = [start for start, _ in list_segments([part.kept.shape[1] for part in parts])]
    pairs = zip(parts, numbers, strict=True)
    neighbors = [part.neighbors + number for part, number in pairs if part.neighbors is not None]
    if not neighbors:
        return PatchGroups(kept)
    width = max(part.shape[2] for part in neighbors)
    padded = [F.pad(part, (0, width - part.shape[2]), value=-1) for part in neighbors]
    return PatchGroups(kept, neighbors=torch.cat(padded, dim=1))


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
        for index in range(reduction.first, reduction.layers):
            layer: Any = tower.layers[index]
            run = partial(_run_layer, reduction, tower, index, layer, layer.forward)
            undo.enter_context(replaced_forward(layer, run))
            attention = getattr(layer, tower.attention)
            if reduction.is_proportional and hasattr(attention, "config"):
                names = (PROPORTIONAL_KERNEL, FLASH_PROPORTIONAL_KERNEL)
                undo.enter_context(swapped_config(attention, names, tokenprune_reduction=reduction))
        yield


def _run_layer(
    reduction: PatchReduction,
    tower: Tower,
    index: int,
    layer: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run one layer on the patches that remain; returns hidden states of the full length."""
    if torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False):
        raise NotImplementedError(
            "a strategy inside the vision tower does not support gradient checkpointing of the tower, which runs "
            "layers again; disable it for the vision tower, or freeze the tower with torch.no_grad"
        )
    if not args:  # the first parameter is the hidden states
        name = next(iter(kwargs))
        args = (kwargs.pop(name),)
    source, *others = args
    hidden = source if source.dim() == 3 else source[None]
    if index == reduction.first:
        reduction.start_pass(tower, hidden)
    if reduction.remaining is None:
        raise RuntimeError(f"layer {index} of the tower ran before layer {reduction.first}")
    sequence = reduction.remaining.gather(hidden)
    depth = len(tower.layers)
    for step in reduction.list_steps(index, "before"):
        real = _find_real(reduction.remaining, kwargs)
        sequence = reduction.reduce(index, depth, step, sequence, {}, real)
    attending = reduction.find_attending(index, reduction.remaining)
    if attending is not reduction.remaining:
        sequence = attending.gather(hidden)
    reduction.inputs.setdefault(index, []).append(attending)
    narrow = [_narrow(attending, None, value) for value in others]
    options = {name: _narrow(attending, name, value) for name, value in kwargs.items()}
    if reduction.key_bias is not None and not hasattr(getattr(layer, tower.attention), "config"):
        options["attn_mask"] = _add_bias(options.get("attn_mask"), reduction.key_bias, sequence.dtype)

    def call(states: Tensor) -> Any:
        return forward(states if source.dim() == 3 else states[0], *narrow, **options)

    steps = reduction.list_steps(index, "inside")
    if steps or attending is not reduction.remaining:
        kinds = {kind for reducer, _ in steps for kind, _ in resolve_needs(reducer.needs, reduction.attention)}
        mlp, attention = getattr(layer, reduction.mlp), getattr(layer, tower.attention)
        single = replace(tower, rows_from={}, segments=None)
        shapes: list[int | None] = []

        def store_structure(module: nn.Module, args: Any, output: Any) -> None:
            shapes.append(len(output) if isinstance(output, tuple) else None)

        hook = attention.register_forward_hook(store_structure)
        try:
            with capture_signals(single, {index: kinds & ATTENTION}) as captured, replaced_forward(mlp, _return_zeros):
                attended = _first(call(sequence))
        finally:
            hook.remove()
        sequence = attended if attended.dim() == 3 else attended[None]
        if attending is not reduction.remaining:
            sequence = reduction.remaining.gather(attending.restore(sequence, hidden))
        signals = {kind: torch.cat(values, token_dim(kind)) for (kind, _), values in captured.items()}
        real = _find_real(reduction.remaining, kwargs)
        for step in steps:
            sequence = reduction.reduce(index, depth, step, sequence, signals, real)
        narrow = [_narrow(reduction.remaining, None, value) for value in others]
        options = {name: _narrow(reduction.remaining, name, value) for name, value in kwargs.items()}
        with replaced_forward(attention, partial(_return_structure, shapes[0])):
            output = call(sequence)
    else:
        output = call(sequence)
    states = _first(output)
    states = states if states.dim() == 3 else states[None]
    reduction.counts.append((len(hidden) * reduction.remaining.entry.shape[1], reduction.remaining.index.numel()))
    full, reduction.previous = reduction.remaining.restore(states, hidden), hidden
    if index == reduction.layers - 1:
        reduction.passes.append(reduction.remaining)
    full = full if source.dim() == 3 else full[0]
    return (full, *output[1:]) if isinstance(output, tuple) else full


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _return_zeros(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(states)


def _return_structure(length: int | None, *args: Any, **kwargs: Any) -> Any:
    """Return zeros in the structure of the output of an attention: a tensor, or a tuple of a given length."""
    states = args[0] if args else next(iter(kwargs.values()))
    zeros = torch.zeros_like(states)
    return zeros if length is None else (zeros, *[None] * (length - 1))


def _narrow(remaining: RemainingPatches, name: str | None, value: Any) -> Any:
    """Return an input of a layer for the entries that remain.

    Args:
        remaining: the patches that remain.
        name: the name of the input; None for positional inputs.
        value: the input for the full length.
    """
    index, length = remaining.sequence_index, remaining.sequence_entry.shape[1]
    if isinstance(value, tuple):
        return tuple(_narrow(remaining, name, part) for part in value)
    if not isinstance(value, Tensor):
        return value
    if name == "cu_seqlens":
        return remaining.find_bounds(value)
    if value.dim() == 4 and value.shape[-2:] == (length, length):  # a mask of pairs of positions
        rows = value.expand(len(index), -1, -1, -1).gather(
            2, index[:, None, :, None].expand(-1, value.shape[1], -1, length)
        )
        return rows.gather(3, index[:, None, None, :].expand(-1, value.shape[1], index.shape[1], -1))
    if value.dim() == 2 and tuple(value.shape) == (len(index), length) and name in MASKS:
        return value.gather(1, index)
    if name == "rope":  # of the patches only, shared by all tiles
        return value[remaining.index][:, None]
    if name == "position_embeddings":
        return value[index[0]] if value.dim() == 2 else value[:, index[0]]
    return value


def _find_real(remaining: RemainingPatches, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the remaining entries that are not padding, bool `[tiles, length]`; None without a mask of padding."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or len(mask) != len(remaining.index):
        return None
    return real_positions(mask).gather(1, remaining.sequence_index)


def _add_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to the logits of attention, `[tiles, 1, 1 or queries, keys]`.

    Args:
        mask: a mask as kernels take it; None without a mask.
        bias: the bias of each key, `[tiles, keys]`.
        dtype: the dtype of the logits.
    """
    added = bias[:, None, None].to(dtype)
    if mask is None:
        return added
    return added.masked_fill(~mask, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + added


def _proportional_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Add the bias of merged patches to the mask, then call the kernel of the original config.

    Flash kernels accept no bias; the call then uses torch's scaled dot product attention.
    """
    config: Any = module.config
    bias, kernel = config.tokenprune_reduction.key_bias, find_kernel(module)
    if bias is None:
        return kernel(module, query, key, value, attention_mask, **kwargs)
    if is_flash_attention_requested(config.tokenprune_original):
        kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return kernel(module, query, key, value, _add_bias(attention_mask, bias, query.dtype), **kwargs)


AttentionInterface.register(PROPORTIONAL_KERNEL, _proportional_attention)
AttentionInterface.register(FLASH_PROPORTIONAL_KERNEL, _proportional_attention)
