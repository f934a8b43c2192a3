"""Runs the vision side of a model once, completely or up to a layer, and captures signals meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.adapter import VisualTokens
from tokenprune.geometry import TileGeometry
from tokenprune.image import SignalKey
from tokenprune.models._capture.hooks import Tower, capture_signals
from tokenprune.models._capture.reduced_layers import reduced_layers
from tokenprune.models._capture.truncated_tower import run_until


class VisionRun(NamedTuple):
    """The result of one run of the vision side.

    Args:
        tokens: the visual tokens of the images.
        outputs: the model's own output object; None if the tower stopped early.
        captured: the captured tensors by kind and layer index, with tiles as the first dimension.
    """

    tokens: VisualTokens
    outputs: Any
    captured: dict[SignalKey, list[Tensor]]


def run_and_capture(
    run: Callable[[], Any],
    tower: Tower,
    kinds_by_layer: dict[int, set[str]],
    feature_layer: int,
    projector: nn.Module | None,
) -> tuple[Any, dict[SignalKey, list[Tensor]]]:
    """Return the result of a function that runs the tower, and the captured tensors by kind and layer index.

    Args:
        run: runs the tower.
        tower: the modules and the sequence layout of the tower.
        kinds_by_layer: kinds of signals per layer index.
        feature_layer: index of the layer whose output the model uses.
        projector: the module whose inputs are the signal ``"projector_inputs"``; None captures no such signal.
    """
    with (
        reduced_layers(tower),
        capture_signals(tower, kinds_by_layer) as captured,
        _captured_inputs(projector) as projector_inputs,
    ):
        outputs = run()
    if tower.patches is not None:
        captured = tower.patches.expand_captured(tower, captured)
    if projector is not None:
        captured["projector_inputs", feature_layer] = projector_inputs
    return outputs, captured


@contextmanager
def _captured_inputs(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Capture the inputs of a module while the block runs; capture nothing if it is None."""
    inputs: list[Tensor] = []
    if module is None:
        yield inputs
        return
    hook = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    try:
        yield inputs
    finally:
        hook.remove()


def run_tower_until(
    forward: Callable[[Tensor], Any],
    pixels: Tensor,
    tower: Tower,
    kinds_by_layer: dict[int, set[str]],
    feature_layers: Sequence[int],
) -> tuple[Tensor, dict[SignalKey, list[Tensor]]]:
    """Return the outputs of the feature layers side by side, and the captured tensors by kind and layer index.

    The tower stops after the last layer that is required.

    Args:
        forward: runs the tower's own `forward`.
        pixels: the tiles of all images, `[tiles, 3, height, width]`.
        tower: the modules and the sequence layout of the tower.
        kinds_by_layer: kinds of signals per layer index.
        feature_layers: indices of the layers whose outputs the model uses.

    Returns:
        the outputs without CLS, `[tiles, patches, width]`, and the captured tensors.
    """
    last = max([*feature_layers, *kinds_by_layer])
    with reduced_layers(tower), capture_signals(tower, kinds_by_layer) as captured:
        outputs = run_until(partial(forward, pixels), tower.layers, last, feature_layers)
    if tower.patches is not None:
        captured = tower.patches.expand_captured(tower, captured)
    return torch.cat(outputs, dim=-1)[:, tower.prefix :], captured


def join_tiles(images: Sequence[Tensor], layouts: Sequence[TileGeometry], name: str) -> Tensor:
    """Return the tiles of all images without padding tiles, `[tiles, 3, height, width]`.

    Args:
        images: the pixels of each image, `[tiles, 3, height, width]` each; padding tiles can follow.
        layouts: the layouts of the images.
        name: the name of the model input, for the message.

    Raises:
        ValueError: if the number of images or tiles differs from the layouts.
    """
    tiles = [image[: layout.tiles] for image, layout in zip(images, layouts, strict=False)]
    numbers = [layout.tiles for layout in layouts]
    if len(images) != len(layouts) or list(map(len, tiles)) != numbers:
        raise ValueError(
            f"{name} hold {len(images)} images of {list(map(len, tiles))} tiles, but their layouts have {numbers}; "
            "make the inputs with the processor that belongs to the model"
        )
    return torch.cat(tiles)
