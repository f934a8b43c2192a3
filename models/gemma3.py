"""Gemma 3: the base tile first, then crops side by side or one below the other (pan and scan); patches are averaged."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from tokenprune.models._base.example import EXAMPLE_IMAGE, example_decoder, example_siglip, with_sharp_attention
from tokenprune.models._base.tiled import TiledAdapter, grid_difference, thumbnail

ALIKE = 0.5
"""Crops show what a base tile shows if they differ from it by less than this part of its variance."""


class Gemma3Adapter(TiledAdapter):
    """`Gemma3ForConditionalGeneration`."""

    family: ClassVar[str] = "gemma3"
    model_class: ClassVar[str] = "Gemma3ForConditionalGeneration"
    projector_path: ClassVar[str | None] = None
    base_first: ClassVar[bool] = True
    post_norm_path: ClassVar[str | None] = "post_layernorm"
    projects_per_token: ClassVar[bool] = True

    @cached_property
    def pooling(self) -> int:
        """Patches along a side that become one visual token."""
        return int(self.model.base_model.multi_modal_projector.kernel_size)

    def visual_tokens(self, patches: Tensor) -> Tensor:
        """Return the visual tokens that are made of some patches: their mean, normed and projected."""
        projector = self.model.base_model.multi_modal_projector
        normed = projector.mm_soft_emb_norm(self.normed(patches).mean(dim=1))
        return torch.as_tensor((normed @ projector.mm_input_projection_weight).to(patches.dtype))

    def all_visual_tokens(self, hidden: Tensor, patches: Tensor) -> Tensor:
        """Return all visual tokens of some tiles, by the projector itself: it adds up in another order."""
        tokens: Tensor = self.model.base_model.multi_modal_projector(self.normed(hidden))
        return tokens.flatten(0, 1)

    def tiles_per_image(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the number of tiles of each image: a base tile and the crops behind it, if they show what it shows.

        Text stands between the base tile and its crops, and always the same few ids between crops. These can also
        stand between two images, so that only pixels tell where the crops end.

        Raises:
            ValueError: if the placeholders do not fit the tiles.
        """
        ids, tiles, numbers = self.prompt_ids(inputs), self.all_tiles(inputs), list[int]()
        spans = self.tile_spans(ids, len(tiles))
        if spans is None:
            return [1] * len(tiles)
        gaps = [
            tuple(ids[tile.row, tile.start + tile.length : after.start].tolist()) if tile.row == after.row else None
            for tile, after in pairwise(spans)
        ]
        while (start := sum(numbers)) < len(tiles):
            most = possible_crops(gaps[start:])
            unlike = {number: crop_difference(tiles[start : start + 1 + number]) for number in range(2, most + 1)}
            number = min(unlike, key=unlike.__getitem__, default=0)
            numbers.append(1 + number if number and unlike[number] < ALIKE else 1)
        return numbers

    def grids(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return rows x cols of the crops of each image: one row, or one column."""
        return [crop_grid(one) for one in parts]

    def example_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the ids that stand for an image; 11 stands before crops and 12 between them."""
        tile, number = [8, *self.example_tile, 9], max(grid)
        return [*tile, 11, *([*tile, 12] * number)[:-1]] if 1 in grid and number > 1 else tile

    def example_tiles(self, size: tuple[int, int]) -> Tensor:
        """Return the tiles of an example image, `[tiles, 3, side, side]`; crops are one row or one column."""
        tiles = super().example_tiles(size)
        return tiles[:1] if len(tiles) > 3 else tiles

    def example_prompts(
        self, rows: Sequence[Sequence[tuple[int, int]]], images: Mapping[tuple[int, int], Sequence[int]]
    ) -> dict[str, Any]:
        """Return inputs with random pixels, and the kind of each token."""
        inputs = super().example_prompts(rows, images)
        return {**inputs, "token_type_ids": (inputs["input_ids"] == self.image_token_id).long()}

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Gemma 3: 4 x 4 tokens a tile, of 8 x 8 patches; a full and a sliding layer."""
        torch.manual_seed(0)
        text = Gemma3TextConfig(
            **example_decoder(num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=False),
            layer_types=["sliding_attention", "full_attention"],
        )
        config = Gemma3Config(
            vision_config=example_siglip(patch_size=7),
            text_config=text,
            image_token_index=EXAMPLE_IMAGE,
            boi_token_index=8,
            eoi_token_index=9,
            mm_tokens_per_image=16,
            tie_word_embeddings=False,
        )
        model = Gemma3ForConditionalGeneration(config)
        with torch.no_grad():
            model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.02)
        return with_sharp_attention(model)


def possible_crops(gaps: Sequence[Hashable]) -> int:
    """Return how many crops at most belong to a base tile.

    Args:
        gaps: what stands behind the base tile and each tile after it, up to the next one; None where a prompt ends.
    """
    if len(gaps) < 2 or None in gaps[:2] or gaps[0] == gaps[1]:
        return 0
    return 1 + sum(1 for _ in takewhile(lambda gap: gap == gaps[1], gaps[1:]))


def crop_grid(tiles: Tensor) -> tuple[int, int]:
    """Return rows x cols of the crops of an image: one row or one column, whichever looks more like the base tile.

    Args:
        tiles: base tile and crops, `[tiles, 3, height, width]`.
    """
    number = len(tiles) - 1
    if number == 0:
        return 0, 0
    return min((1, number), (number, 1), key=lambda grid: grid_difference(tiles[1:], tiles[0], grid))


def crop_difference(tiles: Tensor) -> float:
    """Return how much crops differ from the base tile, as a part of its variance.

    Args:
        tiles: base tile and crops, `[tiles, 3, height, width]`.
    """
    variance = float(thumbnail(tiles[0]).var(dim=(1, 2)).mean())
    return grid_difference(tiles[1:], tiles[0], crop_grid(tiles)) / max(variance, 1e-6)
