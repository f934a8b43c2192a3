"""The base class of strategies that encode images at a lower resolution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune.budget import as_budget
from tokenprune.contracts import require_grid
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage, Signal
from tokenprune.reducer import TokenReducer
from tokenprune.selection import Selection, kept_newlines
from tokenprune.stages import ImageStage, Stage


@dataclass
class ImageReducer(TokenReducer):
    """A strategy that acts before the vision tower: the image is encoded at a lower resolution.

    The budget is an upper limit, because the number of tokens is the product of a height and a width.
    """

    stage: ClassVar[Stage] = ImageStage()
    exact: ClassVar[bool] = False

    @property
    def needs(self) -> Sequence[Signal]:
        """The signal ``"resolution"``: requires a vision tower that accepts other resolutions."""
        return (Signal("resolution"),)

    @abstractmethod
    def token_grid(self, geometry: TileGeometry) -> tuple[int, int] | None:
        """Return the token grid (height, width) at which every tile is encoded; None if no grid fits the budget."""

    def select(self, image: EncodedImage) -> Selection:
        """Return the selection of the resized image: the positions of its tokens in the full-resolution layout."""
        geometry, grid = image.geometry, require_grid(self.token_grid(image.geometry), self, "token_grid")
        kept = torch.zeros(geometry.tiles, geometry.tokens, dtype=torch.bool)
        if grid is not None:
            kept = kept | geometry.valid.cpu() if grid == geometry.token_grid else geometry.resized(grid)[1]
        kept = kept.to(image.device)
        newline_mask = torch.zeros(geometry.newlines, dtype=torch.bool, device=kept.device)
        if self.newlines != "drop":
            newline_mask = kept_newlines(geometry, kept, "keep_rows")
        asked = as_budget(self.budget).asked(geometry)
        return Selection(geometry, kept, asked, newline_mask=newline_mask, resized_grid=grid)
