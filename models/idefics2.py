"""Idefics2: native resolution; a resampler maps every tile to latents; text before and after each tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.geometry import TileGeometry
from tokenprune.models._base.tiled import NestedTilesAdapter


class Idefics2Adapter(NestedTilesAdapter):
    """`Idefics2ForConditionalGeneration`: signals come from the resampler, because a latent has no position.

    Each tile of a split image counts as one image, because the prompt does not group the tiles of an image.
    """

    family: ClassVar[str] = "idefics2"
    model_class: ClassVar[str] = "Idefics2ForConditionalGeneration"
    tower_path: ClassVar[str] = "connector.perceiver_resampler"
    layers_path: ClassVar[str] = "layers"
    projector_path: ClassVar[str | None] = None
    patch_steps: ClassVar[frozenset[str]] = frozenset()  # `tower` is the resampler, whose latents are no patches

    @cached_property
    def token_grid(self) -> tuple[int, int]:
        """Height x width of the visual tokens of one tile: one row of latents."""
        return 1, int(self.tower.n_latents)

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return one tile of latents for each image, or for each part of a split image."""
        return [TileGeometry.single(self.token_grid)] * len(self.all_tiles(inputs))

    def drawable_images(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry], number: int) -> list[Tensor]:
        """Return an empty list, because latents cannot be drawn on an image."""
        return []

    def read_tiles(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Raise an error, because a saliency model requires tokens with positions.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a saliency model scores positions of an image, but the tokens of Idefics2 are latents of a resampler "
            "without positions; use attention='received' instead"
        )
