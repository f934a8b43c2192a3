"""Mistral Small 3.1: native resolution, 2 x 2 patches become one token, a text separator ends each row of an image."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from tokenprune.models._base.native_resolution import PixtralTowerAdapter


class Mistral3Adapter(PixtralTowerAdapter):
    """`Mistral3ForConditionalGeneration`; a patch merger in the projector joins the patches of a token."""

    family: ClassVar[str] = "mistral3"
    model_class: ClassVar[str] = "Mistral3ForConditionalGeneration"
    projector_path: ClassVar[str | None] = None

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return int(self.model.config.spatial_merge_size)
