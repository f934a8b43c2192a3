"""Builds the input of a strategy from the results of a run of the vision side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from tokenprune.adapter import VisualTokens
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage, SignalKey


def build_images(
    layouts: Sequence[TileGeometry],
    tokens: VisualTokens,
    signals: Mapping[SignalKey, Sequence[Tensor]],
    pixels: Sequence[Tensor],
    **shared: Any,
) -> list[EncodedImage]:
    """Return the encoded images of a call.

    Args:
        layouts: the layout of each image.
        tokens: the visual tokens of the images; features are computed from them on request.
        signals: each signal by kind and layer index, one tensor per image.
        pixels: the first images for drawing, uint8 `[tiles, height, width, 3]` each; further images have no pixels.
        shared: arguments of `EncodedImage` that are equal for all images.
    """
    return [
        EncodedImage(
            geometry=layout,
            compute_features=partial(_unpack_image, layout, tokens, number),
            signals={key: parts[number] for key, parts in signals.items()},
            pixels=pixels[number] if number < len(pixels) else None,
            **shared,
        )
        for number, layout in enumerate(layouts)
    ]


def _unpack_image(layout: TileGeometry, tokens: VisualTokens, number: int) -> Tensor:
    """Return the visual tokens of one image by tiles, `[tiles, tokens, dim]`."""
    return layout.unpack(tokens.all()[number].detach())
