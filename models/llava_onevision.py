"""LLaVA-OneVision: as LLaVA-NeXT, but the model shrinks a large canvas and does not tile several images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.geometry import NEWLINE, RECENT_LAYOUTS, TileGeometry
from tokenprune.image import ROW_SIGNALS, Signal
from tokenprune.models._base.vision_inputs import read_once
from tokenprune.models.llava_next import LlavaNextAdapter


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """`LlavaOnevisionForConditionalGeneration`: a SigLIP tower.

    If a canvas has more tokens than `vision_aspect_ratio` allows, the model shrinks it. A position of the smaller
    canvas then has the number of the token at its center; tokens that are at no center are not valid. Features and
    signals of a position are the mixture of tokens that the model computes; attention is scaled by the area.
    """

    family: ClassVar[str] = "llava_onevision"
    model_class: ClassVar[str] = "LlavaOnevisionForConditionalGeneration"
    resizable: ClassVar[bool] = False

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image, shrunk if the model shrinks it."""
        ratio = inputs.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        limit = int(ratio.removeprefix("anyres_max_"))
        return [shrink_layout(layout, limit) for layout in self.unshrunk_layouts(inputs)]

    def can_leave_early(self, inputs: Mapping[str, Any], needs: Sequence[Signal]) -> bool:
        """Return whether the tower can be left early: not if an image is shrunk, which mixes tokens."""
        layouts = zip(self.layouts(inputs), self.unshrunk_layouts(inputs), strict=True)
        is_shrunk = any(len(layout.packed) != len(unshrunk.packed) for layout, unshrunk in layouts)
        return super().can_leave_early(inputs, needs) and not is_shrunk

    def unshrunk_layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image before shrinking."""
        tiled, numbers = super().layouts(inputs), inputs.get("batch_num_images")
        if numbers is None:
            return tiled
        is_tiled = [number == 1 for number in read_once(torch.as_tensor(numbers)).tolist() for _ in range(number)]
        single = TileGeometry.single(self.token_grid)
        single = replace(single, packed=torch.cat([single.packed, torch.tensor([NEWLINE])]))
        return [layout if has_tiles else single for layout, has_tiles in zip(tiled, is_tiled, strict=True)]

    def pack(self, tiles: Tensor, image_size: tuple[int, int], newline: Tensor) -> Tensor:
        """Return the tiles of an image as the model packs them without shrinking, `[length, dim]`."""
        packed, _ = self.model.base_model.pack_image_features(
            [tiles], [image_size], image_newline=newline, vision_aspect_ratio=f"anyres_max_{len(tiles)}"
        )
        return torch.as_tensor(packed[0])

    def split_by_image(
        self, kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return a captured signal for each image, shrunk where the model shrinks features."""
        signals = super().split_by_image(kind, captured, layouts, inputs)
        groups: dict[tuple[TileGeometry, TileGeometry], list[int]] = {}
        for number, pair in enumerate(zip(self.unshrunk_layouts(inputs), layouts, strict=True)):
            if len(pair[0].packed) != len(pair[1].packed):
                groups.setdefault(pair, []).append(number)
        for (unshrunk, layout), numbers in groups.items():  # images of one layout together
            tiles = torch.cat([signals[number] for number in numbers])
            shrunk = shrink_signal(kind, tiles, unshrunk, layout).split(layout.tiles)
            for number, signal in zip(numbers, shrunk, strict=True):
                signals[number] = signal
        return signals


@lru_cache(maxsize=2 * RECENT_LAYOUTS)
def canvas_tokens(layout: TileGeometry, device: torch.device) -> Tensor:
    """Return the number of the sub-image token at each position of the unpadded canvas, `[rows, cols]`.

    Args:
        layout: a layout with sub-images and newline tokens.
        device: the device of the table.
    """
    with torch.inference_mode(False):  # a later call may record gradients
        return layout.packed[layout.tokens :].view(layout.newlines, -1)[:, :-1].contiguous().to(device)


@lru_cache(maxsize=256)
def shrink_layout(layout: TileGeometry, limit: int) -> TileGeometry:
    """Return the layout of an image after its canvas is shrunk to about the tokens of `limit` tiles.

    Args:
        layout: the layout before shrinking.
        limit: number of tiles; a canvas of at most 1.21 times as many tokens is not shrunk.
    """
    if not layout.sub_images or not layout.newlines:
        return layout
    tokens = canvas_tokens(layout, layout.packed.device)
    rows, cols = tokens.shape
    ratio = math.sqrt(rows * cols / (limit * layout.token_grid[0] ** 2))
    if ratio <= 1.1:
        return layout
    height, width = int(rows // ratio), int(cols // ratio)
    ys = ((2 * torch.arange(height) + 1) * rows).div(2 * height, rounding_mode="floor")
    xs = ((2 * torch.arange(width) + 1) * cols).div(2 * width, rounding_mode="floor")
    tokens = F.pad(tokens[ys[:, None], xs], (0, 1), value=NEWLINE)
    return replace(layout, packed=torch.cat([layout.packed[: layout.tokens], tokens.flatten()]))


def shrink_signal(kind: str, value: Tensor, unshrunk: TileGeometry, layout: TileGeometry) -> Tensor:
    """Return a signal in which each valid token holds the value of its position on the shrunk canvas.

    Args:
        kind: the kind of the signal.
        value: the signal of one or more images, with the tiles of all images as the first dimension.
        unshrunk: the layout of each image before shrinking.
        layout: the layout of each image after shrinking.
    """
    if len(unshrunk.packed) == len(layout.packed):
        return value
    has_heads = kind in ROW_SIGNALS or kind == "keys"
    by_token = value.movedim(2, 1) if has_heads else value
    by_image = by_token.reshape(-1, layout.tiles * layout.tokens, by_token.shape[2:].numel())
    old, new = canvas_tokens(unshrunk, value.device), canvas_tokens(layout, value.device)
    small = F.interpolate(by_image[:, old].permute(0, 3, 1, 2), tuple(new.shape), mode="bilinear").permute(0, 2, 3, 1)
    small = small * (old.numel() / new.numel()) if kind in ROW_SIGNALS else small
    shrunk = by_image.index_copy(1, new.flatten(), small.flatten(1, 2)).view(by_token.shape)
    return shrunk.movedim(1, 2) if has_heads else shrunk
