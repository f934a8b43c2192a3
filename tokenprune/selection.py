"""The result of a strategy for one image, and functions that select tokens by score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from tokenprune.geometry import NEWLINE, TileGeometry

if TYPE_CHECKING:
    from PIL import Image

Newlines: TypeAlias = Literal["keep_rows", "drop", "keep"]


@dataclass(frozen=True, eq=False)
class Selection:
    """The tokens of one image that enter the LLM.

    Args:
        geometry: the layout of the image.
        kept: the kept tokens, bool `[tiles, tokens]`.
        asked: number of tokens that the budget grants.
        budgets: number of tokens granted to each tile, `[tiles]`; None if the strategy has no budget per tile.
        scores: the scores of the tokens, `[tiles, tokens]`, for drawing.
        newline_mask: the kept newline tokens, bool `[newlines]`; None applies the `newlines` option of the reducer.
        mixing: for merging methods, the kept tokens as mixtures of all tokens, `[kept, tiles * tokens]` (may be
            sparse). Rows follow the order of the kept tokens in the prompt. None is equivalent to one-hot rows. Before
            the projector, ``tiles`` additional columns can hold the weights of the CLS tokens of the tiles.
        before_projector: whether features are mixed before the projector instead of after it.
        order: the order in which kept tokens enter the LLM, `[kept]`: entry n is the number (in packed order) of the
            token that enters n-th. None is the packed order. Newline tokens keep their positions.
        pixels: the tiles as images for drawing, uint8 `[tiles, height, width, 3]`.
        resized_grid: height x width of the tokens of a tile, for strategies that encode the image at another
            resolution.
    """

    geometry: TileGeometry
    kept: Tensor
    asked: int
    budgets: Tensor | None = None
    scores: Tensor | None = None
    newline_mask: Tensor | None = None
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
        """Number of tokens granted to each tile, base tile first; without budgets, the number of kept tokens."""
        granted: list[int] = self.kept_per_tile if self.budgets is None else self.budgets.tolist()
        return granted

    @property
    def kept_tokens(self) -> int:
        """Number of kept visual tokens without newline tokens."""
        return int(self.kept.sum())

    @property
    def kept_newlines(self) -> int:
        """Number of kept newline tokens."""
        return 0 if self.newline_mask is None else int(self.newline_mask.sum())

    @property
    def everything(self) -> bool:
        """Whether nothing is dropped, mixed or moved."""
        return self.mixing is None and self.order is None and bool(self.packed_mask().all())

    def packed_mask(self) -> Tensor:
        """Return the mask of the kept positions of the packed image, bool `[length]`."""
        packed = self.geometry.packed
        mask = self.kept.flatten()[packed.clamp(min=0)]
        if self.newline_mask is not None:
            mask[packed == NEWLINE] = self.newline_mask
        else:
            mask[packed == NEWLINE] = False
        return mask

    def compact(self) -> Selection:
        """Return a copy of the selection on the CPU without scores and mixing matrix, for long runs."""

        def copy_to_cpu(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.cpu().clone()

        return replace(
            self,
            kept=self.kept.cpu().clone(),
            budgets=copy_to_cpu(self.budgets),
            newline_mask=copy_to_cpu(self.newline_mask),
            order=copy_to_cpu(self.order),
            scores=None,
            mixing=None,
        )

    def overlay(self, image: Image.Image | None = None) -> Image.Image:
        """Draw the kept tokens of every tile, base tile first.

        Args:
            image: the original image, to be drawn next to the tiles.

        Raises:
            ValueError: if the selection has no pixels (a run keeps the pixels of its first images only).
        """
        from tokenprune.viz import overlay

        return overlay(self, image)


def top_per_tile(scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
    """Return the mask of the tokens with the largest scores of each tile.

    Args:
        scores: scores, `[tiles, tokens]`; larger scores are kept first.
        budgets: number of tokens to keep in each tile, `[tiles]`.
        candidates: tokens that may be kept, bool `[tiles, tokens]`.

    Returns:
        Kept tokens, bool `[tiles, tokens]`. Ties go to the lower index.
    """
    finite = scores.float().clamp(min=torch.finfo(torch.float32).min)  # a candidate at -inf precedes non-candidates
    order = finite.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < budgets.to(rank.device)[:, None]) & candidates


def top_of_image(scores: Tensor, total: int, candidates: Tensor) -> Tensor:
    """Return the mask of the tokens with the largest scores of the whole image.

    Args:
        scores: scores, `[tiles, tokens]`; larger scores are kept first.
        total: number of tokens to keep.
        candidates: tokens that may be kept, bool `[tiles, tokens]`.

    Returns:
        Kept tokens, bool `[tiles, tokens]`. Ties go to the lower index.
    """
    budget = torch.full((1,), total, device=scores.device)  # filled on the device: a CUDA graph allows no copy
    return top_per_tile(scores.reshape(1, -1), budget, candidates.reshape(1, -1)).view_as(candidates)


def kept_newlines(geometry: TileGeometry, kept: Tensor, newlines: Newlines) -> Tensor:
    """Return the mask of the kept newline tokens, bool `[newlines]`.

    Args:
        geometry: the layout of the image.
        kept: the kept tokens, bool `[tiles, tokens]`.
        newlines: ``"keep"`` keeps all newline tokens, ``"drop"`` drops all. ``"keep_rows"`` keeps the newline token of
            each row with a kept token. If any token is kept, it also keeps newline tokens that close no row but
            separate parts of the image.

    Raises:
        ValueError: if the option is not known.
    """
    if newlines in ("keep", "drop"):
        return torch.full((geometry.newlines,), newlines == "keep", device=kept.device)
    if newlines != "keep_rows":
        raise ValueError(f"newlines={newlines!r} is not known; use 'keep_rows', 'drop' or 'keep'")
    row, packed = geometry.newline_index.to(kept.device), geometry.packed.to(kept.device)
    in_row = (packed != NEWLINE) & (row >= 0)
    is_kept = torch.full((geometry.newlines,), bool(kept.any()), device=kept.device)
    is_kept[row[in_row]] = False
    is_kept[row[in_row & kept.flatten()[packed.clamp(min=0)]]] = True
    return is_kept
