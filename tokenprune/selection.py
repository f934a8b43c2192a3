"""What a strategy answers: which tokens of an image stay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from tokenprune.image import NEWLINE, TileGeometry

if TYPE_CHECKING:
    from PIL import Image

Newlines: TypeAlias = Literal["keep_rows", "drop", "keep"]


@dataclass(frozen=True, eq=False)
class Selection:
    """The tokens of one image that enter the LLM.

    Args:
        geometry: the layout of the image.
        kept: the kept tokens, bool `[tiles, tokens]`.
        asked: number of tokens that the budget granted.
        budgets: tokens that each tile was granted, `[tiles]`; what was kept per tile where the strategy has no budgets.
        scores: the scores behind the choice, `[tiles, tokens]`, for drawing.
        separators: which learned newlines stay, bool `[separators]`; None leaves it to the reducer's `newlines` option.
        mixing: for merging methods, the kept tokens as mixtures of all tokens, `[kept, tiles * tokens]` (may be
            sparse), rows in the order of the kept tokens in the prompt. None drops the others, as one-hot rows would.
            ``tiles`` more columns stand for the CLS tokens of the tiles, before the projector only.
        before_projector: whether features are mixed before the projector instead of after it.
        order: the order in which kept tokens enter the LLM, `[kept]`: entry n is the number (in packed order) of the
            token that comes n-th. None is the packed order. Newlines stay where they are.
        pixels: the tiles as images for drawing, uint8 `[tiles, height, width, 3]`.
        resized_grid: height x width of the tokens of a tile, for strategies that encode the image at another
            resolution.
    """

    geometry: TileGeometry
    kept: Tensor
    asked: int
    budgets: Tensor | None = None
    scores: Tensor | None = None
    separators: Tensor | None = None
    mixing: Tensor | None = None
    before_projector: bool = False
    order: Tensor | None = None
    pixels: Tensor | None = None
    resized_grid: tuple[int, int] | None = None

    @property
    def kept_per_tile(self) -> list[int]:
        """Number of kept tokens of each tile, base tile first."""
        counts: list[int] = self.kept.sum(dim=1).tolist()
        return counts

    @property
    def granted_per_tile(self) -> list[int]:
        """Number of tokens that each tile was granted, base tile first."""
        granted: list[int] = self.kept_per_tile if self.budgets is None else self.budgets.tolist()
        return granted

    @property
    def kept_tokens(self) -> int:
        """Number of kept visual tokens, newlines not counted."""
        return int(self.kept.sum())

    @property
    def kept_newlines(self) -> int:
        """Number of kept newline tokens."""
        return 0 if self.separators is None else int(self.separators.sum())

    @property
    def everything(self) -> bool:
        """Whether nothing is dropped, mixed or moved."""
        return self.mixing is None and self.order is None and bool(self.packed_mask().all())

    def packed_mask(self) -> Tensor:
        """Return which positions of the packed image stay, bool `[length]`."""
        packed = self.geometry.packed
        mask = self.kept.flatten()[packed.clamp(min=0)]
        if self.separators is not None:
            mask[packed == NEWLINE] = self.separators
        else:
            mask[packed == NEWLINE] = False
        return mask

    def compact(self) -> Selection:
        """Return the selection on the CPU without scores and mixing matrix, for long runs."""

        def small(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.cpu().clone()

        return replace(
            self,
            kept=self.kept.cpu().clone(),
            budgets=small(self.budgets),
            separators=small(self.separators),
            order=small(self.order),
            scores=None,
            mixing=None,
        )

    def overlay(self, image: Image.Image | None = None) -> Image.Image:
        """Draw the kept tokens of every tile, base tile first.

        Args:
            image: the original image, to be drawn beside the tiles that the model saw.

        Raises:
            ValueError: if the selection carries no pixels (a run keeps those of its first images only).
        """
        from tokenprune.viz import overlay

        return overlay(self, image)


def top_per_tile(scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
    """Keep the best tokens of each tile.

    Args:
        scores: the larger the better, `[tiles, tokens]`.
        budgets: tokens to keep in each tile, `[tiles]`.
        candidates: tokens that may be kept, bool `[tiles, tokens]`.

    Returns:
        Kept tokens, bool `[tiles, tokens]`. Ties go to the lower index.
    """
    finite = scores.float().clamp(min=torch.finfo(torch.float32).min)  # a candidate of -inf still precedes all others
    order = finite.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < budgets.to(rank.device)[:, None]) & candidates


def top_of_image(scores: Tensor, total: int, candidates: Tensor) -> Tensor:
    """Keep the best tokens of all tiles in one pool.

    Args:
        scores: the larger the better, `[tiles, tokens]`.
        total: tokens to keep.
        candidates: tokens that may be kept, bool `[tiles, tokens]`.

    Returns:
        Kept tokens, bool `[tiles, tokens]`. Ties go to the lower index.
    """
    budget = torch.full((1,), total, device=scores.device)  # filled there: copies are no part of a CUDA graph
    return top_per_tile(scores.reshape(1, -1), budget, candidates.reshape(1, -1)).view_as(candidates)


def kept_newlines(geometry: TileGeometry, kept: Tensor, newlines: Newlines) -> Tensor:
    """Return which learned newline tokens stay.

    Args:
        geometry: the layout of the image.
        kept: the kept tokens, bool `[tiles, tokens]`.
        newlines: ``"keep"`` all, ``"drop"`` all, or ``"keep_rows"``: those that close a row with a kept token, and, if
            any token is kept, those that close no row but separate parts of the image.

    Returns:
        Bool `[separators]`.

    Raises:
        ValueError: if the option is not known.
    """
    if newlines in ("keep", "drop"):
        return torch.full((geometry.separators,), newlines == "keep", device=kept.device)
    if newlines != "keep_rows":
        raise ValueError(f"newlines={newlines!r} is not known; use 'keep_rows', 'drop' or 'keep'")
    row, packed = geometry.newline_of.to(kept.device), geometry.packed.to(kept.device)
    in_row = (packed != NEWLINE) & (row >= 0)
    stays = torch.full((geometry.separators,), bool(kept.any()), device=kept.device)
    stays[row[in_row]] = False
    stays[row[in_row & kept.flatten()[packed.clamp(min=0)]]] = True
    return stays
