"""Runs the layers of a vision tower on the patches that remain.

Hidden states have the full length between layers: a layer runs on the entries that remain, and each position of a
merged group receives the state of the group. Captured features, CLS tokens, pooling and projectors of the model
therefore stay unchanged. A step inside a layer calls the unmodified layer twice: with an MLP that returns zeros, and,
after the reduction, with an attention that returns zeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, lru_cache, partial
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
    def restores(self) -> bool:
        """Whether the tower has restored all dropped patches in every pass."""
        return all(state.dropped is not None for state in self.passes)

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
    ) -> tuple[RemainingPatches, Tensor]:
        """Reduce the patches that remain; returns them and their sequence, `[tiles, remaining, width]`.

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
        return self.remaining, sequence

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

        Rows of attention and of logits are zero at patches without an entry. All patches of a group share their key.

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
            expanded[kind, layer] = [
                state.expand_rows(value, dim) if kind in ROW_SIGNALS else state.expand_groups(value, dim)
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
        for index in range(reduction.first, len(tower.layers)):  # later layers can run for signals
            layer: Any = tower.layers[index]
            run = partial(run_reduced_layer, reduction, tower, index, layer.forward)
            undo.enter_context(replaced_forward(layer, run))
            attention = getattr(layer, tower.attention)
            if reduction.is_proportional and hasattr(attention, "config"):
                names = (PROPORTIONAL_KERNEL, FLASH_PROPORTIONAL_KERNEL)
                undo.enter_context(swapped_config(attention, names, tokenprune_reduction=reduction))
        yield


@cache
def list_parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the parameters of the `forward` of a layer class; the first is the hidden states."""
    return tuple(inspect.signature(forward).parameters)[1:]


class LayerCall:
    """One call of a layer with hidden states of the full length, run on the entries that remain.

    Args:
        layer: the layer.
        forward: its own `forward`.
        attention: name of its attention module.
        mlp: name of its MLP.
        args: positional inputs of the call; the first is the hidden states, `[(tiles,) length, width]`.
        kwargs: keyword inputs of the call.
    """

    def __init__(
        self, layer: nn.Module, forward: Callable[..., Any], attention: str, mlp: str, args: Any, kwargs: Any
    ) -> None:
        first, *names = list_parameters(type(layer).forward)
        self.options: dict[str, Any] = {**dict(zip((first, *names), args, strict=False)), **kwargs}
        self.source: Tensor = self.options.pop(first)
        self._run_layer, self.layer, self.attention_name, self.mlp = forward, layer, attention, mlp

    @property
    def attention(self) -> Any:
        """The attention module."""
        return getattr(self.layer, self.attention_name)

    @property
    def hidden(self) -> Tensor:
        """The hidden states of the full length, `[tiles, length, width]`."""
        return self.source if self.source.dim() == 3 else self.source[None]

    def run(self, sequence: Tensor, remaining: RemainingPatches, bias: Tensor | None = None) -> Any:
        """Return the output of the layer for the entries that remain.

        Args:
            sequence: their hidden states, `[tiles, remaining, width]`.
            remaining: the patches that remain.
            bias: the bias on the keys, `[tiles, remaining]`, for an attention module without a config; such a module
                takes it as a mask.
        """
        options = {name: narrow_input(remaining, name, value) for name, value in self.options.items()}
        if bias is not None and not hasattr(self.attention, "config"):
            options["attn_mask"] = add_bias(options.get("attn_mask"), bias, sequence.dtype)
        return self._run_layer(sequence if self.source.dim() == 3 else sequence[0], **options)

    def run_attention(
        self, sequence: Tensor, remaining: RemainingPatches, bias: Tensor | None = None
    ) -> tuple[Tensor, int | None]:
        """Return the sequence after attention and its residual, and the number of outputs of the attention module.

        Args:
            sequence: hidden states of the entries that remain, `[tiles, remaining, width]`.
            remaining: the patches that remain.
            bias: the bias on the keys, `[tiles, remaining]`.

        Returns:
            The sequence, `[tiles, remaining, width]`; and the length of the tuple that the attention module returns,
            None if it returns a tensor.
        """
        lengths: list[int | None] = []

        def store_length(module: nn.Module, args: Any, output: Any) -> None:
            lengths.append(len(output) if isinstance(output, tuple) else None)

        hook = self.attention.register_forward_hook(store_length)
        try:
            with replaced_child(self.layer, self.mlp, ZeroModule(None)):
                states = read_states(self.run(sequence, remaining, bias))
            return states, lengths[0] if lengths else None  # a skipped layer runs no attention
        finally:
            hook.remove()

    def run_mlp(self, sequence: Tensor, remaining: RemainingPatches, length: int | None) -> Any:
        """Return the output of the layer for a sequence after attention.

        Args:
            sequence: the result of `run_attention`, possibly reduced, `[tiles, remaining, width]`.
            remaining: the patches that remain.
            length: number of outputs of the attention module, from `run_attention`.
        """
        with replaced_child(self.layer, self.attention_name, ZeroModule(length)):
            return self.run(sequence, remaining)

    def find_real(self, remaining: RemainingPatches) -> Tensor | None:
        """Return the remaining entries that are not padding, bool `[tiles, remaining]`; None without such a mask.

        Args:
            remaining: the patches that remain.
        """
        mask = self.options.get("attention_mask")
        if not isinstance(mask, Tensor) or len(mask) != len(remaining.index):
            return None
        return real_positions(mask).gather(1, remaining.sequence_index)

    def restore(self, output: Any, remaining: RemainingPatches) -> Any:
        """Return an output of the layer with hidden states of the full length.

        Args:
            output: the output for the entries that remain.
            remaining: the patches that remain.
        """
        full = remaining.restore(read_states(output), self.hidden)
        full = full if self.source.dim() == 3 else full[0]
        return (full, *output[1:]) if isinstance(output, tuple) else full


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


def read_states(output: Any) -> Tensor:
    """Return the hidden states in the output of a layer, `[tiles, length, width]`."""
    states = output[0] if isinstance(output, tuple) else output
    return states if states.dim() == 3 else states[None]


class ZeroModule(nn.Module):
    """A module in place of the attention or the MLP of a layer: returns zeros, so that only the residual remains.

    It replaces the module and not its `forward`, because hooks on the module must run once per layer.

    Args:
        length: length of the returned tuple, zeros first; None returns a tensor.
    """

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.length = length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros in the shape of the first input."""
        zeros = torch.zeros_like(args[0] if args else next(iter(kwargs.values())))
        return zeros if self.length is None else (zeros, *[None] * (self.length - 1))


@contextmanager
def replaced_child(module: nn.Module, name: str, child: nn.Module) -> Iterator[None]:
    """Replace a child of a module inside the block.

    Args:
        module: the module.
        name: name of the child.
        child: the module that replaces it.
    """
    original = module._modules[name]
    module._modules[name] = child
    try:
        yield
    finally:
        module._modules[name] = original


def narrow_input(remaining: RemainingPatches, name: str, value: Any) -> Any:
    """Return an input of a layer for the entries that remain.

    Args:
        remaining: the patches that remain.
        name: the name of the input.
        value: the input for the full length.
    """
    index, length = remaining.sequence_index, remaining.sequence_entry.shape[1]
    if isinstance(value, tuple):
        return tuple(narrow_input(remaining, name, part) for part in value)
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


def add_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
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
    return kernel(module, query, key, value, add_bias(attention_mask, bias, query.dtype), **kwargs)


AttentionInterface.register(PROPORTIONAL_KERNEL, _proportional_attention)
AttentionInterface.register(FLASH_PROPORTIONAL_KERNEL, _proportional_attention)
