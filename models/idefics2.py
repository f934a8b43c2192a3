"""Idefics2: native resolution; a resampler maps every tile to latents; text before and after each tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Idefics2Config, Idefics2ForConditionalGeneration

from tokenprune.geometry import TileGeometry
from tokenprune.models._base.example import EXAMPLE_IMAGE, example_llm, example_tower, with_sharp_attention
from tokenprune.models.idefics3 import NestedTilesAdapter


class Idefics2Adapter(NestedTilesAdapter):
    """`Idefics2ForConditionalGeneration`: signals come from the resampler, because a latent has no position.

    Each tile of a split image counts as one image, because the prompt does not group the tiles of an image.
    """

    family: ClassVar[str] = "idefics2"
    model_class: ClassVar[str] = "Idefics2ForConditionalGeneration"
    tower_path: ClassVar[str] = "connector.perceiver_resampler"
    layers_path: ClassVar[str] = "layers"
    projector_path: ClassVar[str | None] = None

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

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Idefics2: eight latents, and four resampler layers, because some methods read four layers."""
        torch.manual_seed(0)
        heads = {"resampler_depth": 4, "resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2}
        llm = example_llm()
        llm.hidden_size = 16  # also the width of the resampler
        config = Idefics2Config(
            vision_config=example_tower(),
            perceiver_config={"hidden_size": 16, "resampler_n_latents": 8, **heads},
            text_config=llm,
            image_token_id=EXAMPLE_IMAGE,
        )
        model = Idefics2ForConditionalGeneration(config)
        with torch.no_grad():
            model.model.connector.perceiver_resampler.latents.normal_()  # all latents are equal before training
        return with_sharp_attention(model, tower="perceiver_resampler")

    def example_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of one tile, because example images are not split."""
        return 1, 1
