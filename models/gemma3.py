"""Gemma 3: the base tile first, then crops in one row or one column (pan and scan); patches are averaged."""

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

MAX_DIFFERENCE = 0.5
"""Largest difference, as a fraction of the variance of the base tile, at which crops belong to a base tile."""


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
        """Number of patches along a side of one visual token."""
        return int(self.model.base_model.multi_modal_projector.kernel_size)

    def project_patches(self, patches: Tensor) -> Tensor:
        """Return the visual tokens of the given patches: the mean of the patches, normalized and projected."""
        projector = self.model.base_model.multi_modal_projector
        normed = projector.mm_soft_emb_norm(self.apply_post_norm(patches).mean(dim=1))
        return torch.as_tensor((normed @ projector.mm_input_projection_weight).to(patches.dtype))

    def project_tiles(self, hidden: Tensor, patches: Tensor) -> Tensor:
        """Return all visual tokens of the given tiles with the projector itself, which sums in another order."""
        tokens: Tensor = self.model.base_model.multi_modal_projector(self.apply_post_norm(hidden))
        return tokens.flatten(0, 1)

    def tiles_per_image(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the number of tiles of each image: a base tile, and the crops after it whose pixels resemble it.

        The prompt has text between the base tile and its crops, and the same few ids between all crops. These ids can
        also separate two images, so only the pixels determine the last crop.

        Raises:
            ValueError: if the placeholders do not fit the tiles.
        """
        ids, tiles, numbers = self.prompt_ids(inputs), self.all_tiles(inputs), list[int]()
        spans = self.tile_spans(ids, len(tiles))
        if spans is None:
            return [1] * len(tiles)
        gaps = [
            tuple(ids[tile.row, tile.start + tile.length : following.start].tolist())
            if tile.row == following.row
            else None
            for tile, following in pairwise(spans)
        ]
        while (start := sum(numbers)) < len(tiles):
            max_crops = count_possible_crops(gaps[start:])
            differences = {
                number: crop_difference(tiles[start : start + 1 + number]) for number in range(2, max_crops + 1)
            }
            number = min(differences, key=differences.__getitem__, default=0)
            numbers.append(1 + number if number and differences[number] < MAX_DIFFERENCE else 1)
        return numbers

    def grids(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return rows x cols of the crops of each image: one row, or one column."""
        return [find_crop_grid(tiles) for tiles in parts]

    def example_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the token ids of an image; 11 precedes the crops and 12 separates them."""
        tile, number = [8, *self.example_tile, 9], max(grid)
        return [*tile, 11, *([*tile, 12] * number)[:-1]] if 1 in grid and number > 1 else tile

    def example_tiles(self, size: tuple[int, int]) -> Tensor:
        """Return the tiles of an example image, `[tiles, 3, side, side]`; crops are one row or one column."""
        tiles = super().example_tiles(size)
        return tiles[:1] if len(tiles) > 3 else tiles

    def example_prompts(
        self, rows: Sequence[Sequence[tuple[int, int]]], images: Mapping[tuple[int, int], Sequence[int]]
    ) -> dict[str, Any]:
        """Return inputs with random pixels, and the type id of each token."""
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


def count_possible_crops(gaps: Sequence[Hashable]) -> int:
    """Return the largest number of crops that can belong to a base tile.

    Args:
        gaps: the text between each tile and the next tile, starting at the base tile; None at the end of a prompt.
    """
    if len(gaps) < 2 or None in gaps[:2] or gaps[0] == gaps[1]:
        return 0
    return 1 + sum(1 for _ in takewhile(lambda gap: gap == gaps[1], gaps[1:]))


def find_crop_grid(tiles: Tensor) -> tuple[int, int]:
    """Return rows x cols of the crops of an image: one row or one column, whichever differs less from the base tile.

    Args:
        tiles: base tile and crops, `[tiles, 3, height, width]`.
    """
    number = len(tiles) - 1
    if number == 0:
        return 0, 0
    return min((1, number), (number, 1), key=lambda grid: grid_difference(tiles[1:], tiles[0], grid))


def crop_difference(tiles: Tensor) -> float:
    """Return the difference between crops and base tile as a fraction of the variance of the base tile.

    Args:
        tiles: base tile and crops, `[tiles, 3, height, width]`.
    """
    variance = float(thumbnail(tiles[0]).var(dim=(1, 2)).mean())
    return grid_difference(tiles[1:], tiles[0], find_crop_grid(tiles)) / max(variance, 1e-6)
