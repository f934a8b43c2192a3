"""LLaVA-OneVision: as LLaVA-NeXT, but a large canvas of sub-images is shrunk, and several images are not tiled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from tokenprune.image import NEWLINE, ROW_SIGNALS, Signal, TileGeometry
from tokenprune.models._base.example import example_parts, example_siglip, with_sharp_attention
from tokenprune.models.llava_next import EXAMPLE_GRIDS, LlavaNextAdapter


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """`LlavaOnevisionForConditionalGeneration`: a SigLIP tower.

    A canvas of more tokens than `vision_aspect_ratio` allows is shrunk by the model. A position of the smaller canvas
    is then called by the token at its center, and tokens that are nowhere at a center are not valid. Its features and
    signals are the mixture of tokens that the model makes; attention is as much as the area holds.
    """

    family: ClassVar[str] = "llava_onevision"
    model_class: ClassVar[str] = "LlavaOnevisionForConditionalGeneration"
    resizable: ClassVar[bool] = False

    @classmethod
    def example(cls) -> Any:
        """Return a tiny LLaVA-OneVision that shrinks a canvas of four tiles to the tokens of two."""
        torch.manual_seed(0)
        parts = {**example_parts(), "vision_config": example_siglip()}
        config = LlavaOnevisionConfig(
            **parts, image_grid_pinpoints=EXAMPLE_GRIDS, vision_aspect_ratio="anyres_max_2", video_token_index=4
        )
        return with_sharp_attention(LlavaOnevisionForConditionalGeneration(config))

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image by its size, shrunk if the model shrinks it."""
        ratio = inputs.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        limit = int(ratio.removeprefix("anyres_max_"))
        return [shrunk(one, limit) for one in self.whole_layouts(inputs)]

    def can_leave_early(self, inputs: Mapping[str, Any], needs: Sequence[Signal]) -> bool:
        """Return whether the tower can be left early: not if one is shrunk, which mixes tokens."""
        layouts = zip(self.layouts(inputs), self.whole_layouts(inputs), strict=True)
        is_shrunk = any(len(layout.packed) != len(whole.packed) for layout, whole in layouts)
        return super().can_leave_early(inputs, needs) and not is_shrunk

    def whole_layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image before anything is shrunk."""
        tiled, numbers = super().layouts(inputs), inputs.get("batch_num_images")
        if numbers is None:
            return tiled
        alone = [one == 1 for one in torch.as_tensor(numbers).tolist() for _ in range(one)]
        single = TileGeometry.single(self.token_grid)
        single = replace(single, packed=torch.cat([single.packed, torch.tensor([NEWLINE])]))
        return [whole if one else single for whole, one in zip(tiled, alone, strict=True)]

    def pack(self, tiles: Tensor, image_size: tuple[int, int], newline: Tensor) -> Tensor:
        """Return the tiles of an image as the model packs them when nothing is shrunk, `[length, dim]`."""
        packed, _ = self.model.base_model.pack_image_features(
            [tiles], [image_size], image_newline=newline, vision_aspect_ratio=f"anyres_max_{len(tiles)}"
        )
        return torch.as_tensor(packed[0])

    def split_by_image(
        self, kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return a captured signal by images, shrunk where the model shrinks features."""
        found = super().split_by_image(kind, captured, layouts, inputs)
        wholes = self.whole_layouts(inputs)
        return [shrink_signal(kind, *one) for one in zip(found, wholes, layouts, strict=True)]


def canvas(layout: TileGeometry) -> Tensor:
    """Return which token of the sub-images stands at each place of the unpadded canvas, `[rows, cols]`."""
    return layout.packed[layout.tokens :].view(layout.separators, -1)[:, :-1]


def shrunk(whole: TileGeometry, limit: int) -> TileGeometry:
    """Return the layout of an image whose canvas is shrunk to about the tokens of `limit` tiles.

    Args:
        whole: its layout before.
        limit: tiles; a canvas of at most 1.21 times as many tokens stays as it is.
    """
    if not whole.sub_images or not whole.separators:
        return whole
    places = canvas(whole)
    rows, cols = places.shape
    ratio = math.sqrt(rows * cols / (limit * whole.token_grid[0] ** 2))
    if ratio <= 1.1:
        return whole
    height, width = int(rows // ratio), int(cols // ratio)
    down = ((2 * torch.arange(height) + 1) * rows).div(2 * height, rounding_mode="floor")
    across = ((2 * torch.arange(width) + 1) * cols).div(2 * width, rounding_mode="floor")
    places = F.pad(places[down[:, None], across], (0, 1), value=NEWLINE)
    return replace(whole, packed=torch.cat([whole.packed[: whole.tokens], places.flatten()]))


def shrink_signal(kind: str, value: Tensor, whole: TileGeometry, layout: TileGeometry) -> Tensor:
    """Return a signal whose valid tokens hold what the shrunk positions show.

    Args:
        kind: the kind of the signal.
        value: the signal, tiles first.
        whole: the layout before the canvas was shrunk.
        layout: the layout after it.
    """
    if len(whole.packed) == len(layout.packed):
        return value
    heads = kind in ROW_SIGNALS or kind == "keys"
    by_token = value.movedim(2, 1) if heads else value
    flat = by_token.flatten(2).flatten(0, 1)
    old, new = canvas(whole).to(value.device), canvas(layout).to(value.device)
    small = F.interpolate(flat[old].permute(2, 0, 1)[None], tuple(new.shape), mode="bilinear")[0].permute(1, 2, 0)
    flat = flat.clone()
    flat[new] = small * (old.numel() / new.numel()) if kind in ROW_SIGNALS else small
    flat = flat.view(by_token.shape)
    return flat.movedim(1, 2) if heads else flat
