"""Vision towers as compiled graphs that end at the last required layer and return the captured signals.

A graph cannot contain the hooks and the exception of `run_until`. Each graph therefore runs a copy of the tower that
shares its weights. The copy has only the required layers, and its capture hooks stay. The tower of the model does not
change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokenprune.compiled import CompileOptions, GraphCache, compile_function, copy_outputs
from tokenprune.image import SignalKey
from tokenprune.models._capture.hooks import Tower, capture_signals

M = TypeVar("M", bound=nn.Module)


class _TowerGraph(NamedTuple):
    """A compiled tower.

    Args:
        run: maps the inputs of the tower to its outputs and signals.
        hooks: the contexts of the capture hooks on the copy of the tower, which end with this object.
    """

    run: Callable[..., Any]
    hooks: ExitStack


class CompiledTower:
    """The compiled vision tower of one live model.

    Args:
        tower: the tower. Its weights are read in each call, its hooks and its configuration only now.
        layers_path: path of its encoder layers.
        options: the compiler.
    """

    def __init__(self, tower: nn.Module, layers_path: str, options: CompileOptions) -> None:
        self._tower, self._layers_path, self._options = copy_sharing_weights(tower), layers_path, options
        self._graphs = GraphCache()

    def run_until(
        self, pixels: Tensor, parts: Tower, kinds_by_layer: dict[int, set[str]], feature_layers: Sequence[int]
    ) -> tuple[Tensor, dict[SignalKey, list[Tensor]]]:
        """Return the outputs of the feature layers side by side, and the captured tensors by kind and layer index.

        As `run_tower_until`, in one graph.

        Args:
            pixels: the tiles of all images, `[tiles, 3, height, width]`.
            parts: the modules and the sequence layout of the tower.
            kinds_by_layer: kinds of signals per layer index.
            feature_layers: indices of the layers whose outputs the model uses.
        """
        read = tuple(feature_layers)
        kinds = {**kinds_by_layer, **{layer: kinds_by_layer.get(layer, set()) for layer in read}}
        (_, hidden), captured = self.run((), (pixels,), parts, kinds, read)
        return torch.cat(hidden, dim=-1)[:, parts.prefix :], captured

    def run(
        self,
        layout: Hashable,
        inputs: tuple[Tensor, ...],
        parts: Tower,
        kinds_by_layer: Mapping[int, set[str]],
        read: Sequence[int] = (),
        arguments: Callable[[], Mapping[str, Any]] = dict,
        fields: Sequence[str] = (),
    ) -> tuple[tuple[dict[str, Any], list[Tensor]], dict[SignalKey, list[Tensor]]]:
        """Return outputs of the tower, outputs of its layers, and the captured tensors by kind and layer index.

        Args:
            layout: the layout of the images, as far as the shapes of the inputs do not define it.
            inputs: positional arguments of the tower.
            parts: the modules and the sequence layout of the tower.
            kinds_by_layer: kinds of signals per layer index; layers after the last of them do not run.
            read: indices of the layers whose outputs are returned.
            arguments: computes keyword arguments of the tower that depend on the layout only.
            fields: fields of the output object of the tower to return.
        """
        kinds = tuple(sorted((layer, tuple(sorted(names))) for layer, names in kinds_by_layer.items()))
        shapes = tuple((tuple(value.shape), value.dtype, value.device) for value in inputs)
        key = (layout, shapes, kinds, tuple(read), tuple(fields))
        graph = self._graphs.get(key, lambda: self._compile(parts, dict(kinds_by_layer), read, arguments(), fields))
        outputs, hidden, captured = copy_outputs(graph.run(*inputs))
        return (outputs, hidden), captured

    def _compile(
        self,
        parts: Tower,
        kinds_by_layer: dict[int, set[str]],
        read: Sequence[int],
        arguments: Mapping[str, Any],
        fields: Sequence[str],
    ) -> _TowerGraph:
        """Return a compiled function from the inputs of the tower to its outputs and signals."""
        tower = copy_sharing_weights(self._tower)
        layers: Any = attrgetter(self._layers_path)(tower)
        del layers[max(kinds_by_layer) + 1 :]
        hooks = ExitStack()
        captured = hooks.enter_context(capture_signals(replace(parts, layers=layers), kinds_by_layer))
        states: dict[int, Tensor] = {}

        def store(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                states[index] = output[0] if isinstance(output, tuple) else output

            return hook

        for index in read:
            layers[index].register_forward_hook(store(index))

        def encode(*inputs: Tensor) -> tuple[dict[str, Tensor], list[Tensor], dict[SignalKey, list[Tensor]]]:
            output = tower(*inputs, **arguments)
            signals = {key: list(values) for key, values in captured.items()}
            hidden = [states[index] for index in read]
            captured.clear()
            states.clear()
            return {name: output[name] for name in fields}, hidden, signals

        name = f"the vision tower {type(self._tower).__name__}"
        return _TowerGraph(compile_function(encode, self._options, name), hooks)


def copy_sharing_weights(module: M) -> M:
    """Return a copy of a module whose parameters and buffers are those of the module.

    Args:
        module: the module.
    """
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


class HostLengths:
    """Cumulative sequence lengths on the host, which a graph reads as constants.

    Towers with several sequences per call compute ``(lengths[1:] - lengths[:-1]).tolist()``; with a tensor, the host
    would wait for the device, and the tower would be no single graph.

    Args:
        values: the cumulative lengths.
    """

    def __init__(self, values: Sequence[int]) -> None:
        self.values = list(values)

    def __getitem__(self, index: slice) -> HostLengths:
        """Return a part of the lengths."""
        return HostLengths(self.values[index])

    def __sub__(self, subtrahend: HostLengths) -> HostLengths:
        """Return the differences."""
        return HostLengths([a - b for a, b in zip(self.values, subtrahend.values, strict=True)])

    def tolist(self) -> list[int]:
        """Return the lengths."""
        return self.values
