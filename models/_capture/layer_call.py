"""Calls a layer of a vision tower on the entries that remain, as a whole or half by half."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.encoder.patches import RemainingPatches
from tokenprune.models._capture.hooks import real_positions
from tokenprune.models._capture.proportional_attention import add_bias

MASKS = ("attention_mask", "attn_mask")
"""Names of the inputs of a layer that mask pairs of positions."""


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
