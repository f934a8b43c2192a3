"""Idefics3 and SmolVLM: sub-images in row-major order, each after its row and column as text; the base tile last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.geometry import TileGeometry
from tokenprune.image import Signal
from tokenprune.models._base.tiled import NestedTilesAdapter, placeholder_spans, tile_spans
from tokenprune.rewrite import TextSeparatorSide


class Idefics3Adapter(NestedTilesAdapter):
    """`Idefics3ForConditionalGeneration`; ``<row_i_col_j>`` belongs to the tile after it, a line break to its row."""

    family: ClassVar[str] = "idefics3"
    model_class: ClassVar[str] = "Idefics3ForConditionalGeneration"
    text_separator_side: ClassVar[TextSeparatorSide] = "before"
    projector_path: ClassVar[str | None] = "connector.modality_projection"
    pooling_config_key: ClassVar[str | None] = "scale_factor"
    post_norm_path: ClassVar[str | None] = "post_layernorm"
    projects_per_token: ClassVar[bool] = True

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image, from the text between its tiles.

        Raises:
            ValueError: if the placeholders do not fit the tiles.
        """
        self.check_inputs(inputs)
        ids, tiles, grids = self.prompt_ids(inputs), len(self.all_tiles(inputs)), list[tuple[int, int]]()
        if self.tile_spans(ids, tiles) is not None:
            with suppress(ValueError):  # the prompt does not come from the processor
                grids = tile_grids(ids, self.image_token_id, self.tokens_per_tile)
        return [TileGeometry.tiled(grid, self.token_grid, self.base_first) for grid in grids or [(0, 0)] * tiles]

    def can_leave_early(self, inputs: Mapping[str, Any], needs: Sequence[Signal]) -> bool:
        """Return whether the tower can be left early: not if some patches of a tile are masked."""
        mask = inputs.get("pixel_attention_mask")
        if mask is not None:
            real = mask.bool().flatten(2)  # all False for padding tiles
            if bool((real.any(dim=2) != real.all(dim=2)).any()):
                return False
        return super().can_leave_early(inputs, needs)

    def project_patches(self, patches: Tensor) -> Tensor:
        """Return the visual tokens of the given patches, which pixel shuffle processes as one small image per token."""
        tokens: Tensor = self.model.base_model.connector(self.apply_post_norm(patches))
        return tokens[:, 0]


class SmolVLMAdapter(Idefics3Adapter):
    """`SmolVLMForConditionalGeneration`."""

    family: ClassVar[str] = "smolvlm"
    model_class: ClassVar[str] = "SmolVLMForConditionalGeneration"

    def all_tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tiles that the tower encodes; if all tiles are zero, the model encodes the first tile."""
        tiles = super().all_tiles(inputs)
        return tiles if len(tiles) else inputs[self.pixels].flatten(0, 1)[:1]


def tile_grids(ids: Tensor, placeholder: int, tokens: int | None = None) -> list[tuple[int, int]]:
    """Return rows x cols of the sub-images of each image, in the order of the prompts.

    One token opens each tile and closes an image. It occurs once between tiles of an image and twice between images. At
    the end of a row of tiles, a line break precedes it. Tiles without a line break, or without text between them, count
    as one image each.

    Args:
        ids: the prompts, `[rows, length]`.
        placeholder: id of the image placeholder.
        tokens: number of placeholders of one tile; None if each span of placeholders is one tile.

    Raises:
        ValueError: if rows of tiles differ in length, or text interrupts a tile.
    """
    grids = list[tuple[int, int]]()
    spans = placeholder_spans(ids == placeholder)
    tiles = spans if tokens is None else tile_spans(spans, tokens)
    if tiles is None:
        raise ValueError(f"text interrupts a tile of {tokens} tokens")
    for row in sorted({tile.row for tile in tiles}):
        in_row = [tile for tile in tiles if tile.row == row]
        starts = [*(tile.start for tile in in_row[1:]), ids.shape[1]]
        texts = [
            ids[row, tile.start + tile.length : start].tolist() for tile, start in zip(in_row, starts, strict=True)
        ]
        mark, breaks = (texts[-1] or [placeholder])[0], list[bool]()
        for text in [*texts[:-1], [mark, mark]]:
            if text.count(mark) == 1:
                breaks.append(text[0] != mark)
                continue
            lines = sum(breaks)
            cols = len(breaks) // max(lines, 1)
            if lines and breaks != ([False] * (cols - 1) + [True]) * lines:
                raise ValueError(
                    f"the {len(breaks)} tiles of an image are not a grid: its prompt breaks lines at {breaks}"
                )
            grids += [(lines, cols)] if lines else [(0, 0)] * (1 + len(breaks))
            breaks = []
    return grids
