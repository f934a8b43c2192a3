"""The result of a strategy for one image, and functions that select tokens by score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from tokenprune.geometry import TileGeometry
from tokenprune.literals import check_literal

if TYPE_CHECKING:
    from PIL import Image

Newlines: TypeAlias = Literal["keep_rows", "drop", "keep"]


TENSOR_FIELDS = ("kept", "budgets", "scores", "newline_mask", "mixing", "order")
"""Fields of a selection that are tensors on the device of the image."""


class MaskCount(NamedTuple):
    """The number of true entries of a mask, stored so that the mask is not read from the device.

    It is void for another mask, and for this mask after a modification in place.

    Args:
        mask: the mask.
        number: its number of true entries.
        version: how often the mask was modified in place before it was counted.
    """

    mask: Tensor
    number: int
    version: int

    @classmethod
    def of(cls, mask: Tensor, number: int) -> MaskCount:
        """Return the count of a mask."""
        return cls(mask, number, count_modifications(mask))

    def holds_for(self, mask: Tensor | None) -> bool:
        """Return whether this is the counted mask, unmodified."""
        return mask is self.mask and count_modifications(mask) == self.version


def _stored_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of `torch.vmap`; it counts modifications, the wrappers do not."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def count_modifications(tensor: Tensor) -> int:
    """Return the number of modifications of a tensor; 0 for inference tensors, which do not count them."""
    if torch.compiler.is_compiling():
        return 0
    stored = _stored_tensor(tensor)
    return 0 if stored.is_inference() else stored._version


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
        counts: the stored numbers of true entries of `kept` and `newline_mask`; they avoid reading the masks from the
            device.
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
    counts: tuple[MaskCount, ...] = ()

    @classmethod
    def all_tokens(cls, geometry: TileGeometry, pixels: Tensor | None = None) -> Selection:
        """Return the selection that keeps every token of an image.

        Args:
            geometry: the layout of the image.
            pixels: the tiles as images for drawing.
        """
        newline_mask = torch.ones(geometry.newlines, dtype=torch.bool)
        kept, total = geometry.original.valid, geometry.valid_tokens
        counts = (MaskCount.of(kept, total), MaskCount.of(newline_mask, geometry.newlines))
        return cls(geometry, kept, total, newline_mask=newline_mask, pixels=pixels, counts=counts)

    @property
    def kept_per_tile(self) -> list[int]:
        """Number of kept tokens of each tile, base tile first."""
        return self.kept.sum(dim=1).tolist()

    @property
    def granted_per_tile(self) -> list[int]:
        """Number of tokens granted to each tile, base tile first; without budgets, the number of kept tokens."""
        return self.kept_per_tile if self.budgets is None else self.budgets.tolist()

    @property
    def kept_tokens(self) -> int:
        """Number of kept visual tokens without newline tokens."""
        return int(self.kept.sum()) if self.token_count is None else self.token_count

    @property
    def token_count(self) -> int | None:
        """Number of kept tokens if `counts` stores it, else None."""
        return next((count.number for count in self.counts if count.holds_for(self.kept)), None)

    def with_token_count(self, number: int) -> Selection:
        """Return the selection with a known number of kept tokens; the number is lost if `kept` is modified.

        Args:
            number: number of kept tokens.
        """
        kept = self.kept
        if not torch.compiler.is_compiling() and _stored_tensor(kept).is_inference():
            with torch.inference_mode(False):  # an inference tensor does not count its modifications
                kept = kept.clone()
        return replace(self, kept=kept, counts=(MaskCount.of(kept, number),))

    @property
    def newline_count(self) -> int | None:
        """Number of kept newline tokens if `counts` stores it, else None."""
        return next((count.number for count in self.counts if count.holds_for(self.newline_mask)), None)

    @property
    def kept_newlines(self) -> int:
        """Number of kept newline tokens."""
        if self.newline_count is not None:
            return self.newline_count
        return 0 if self.newline_mask is None else int(self.newline_mask.sum())

    @property
    def is_mixed(self) -> bool:
        """Whether kept tokens are mixtures of tokens."""
        return self.mixing is not None

    @property
    def is_ordered(self) -> bool:
        """Whether the order of the kept tokens differs from the packed order of the model."""
        return self.order is not None

    @property
    def is_identity(self) -> bool:
        """Whether all tokens are kept, without mixing and in the packed order of the model."""
        total = self.geometry.valid_tokens + self.geometry.newlines
        return self.mixing is None and self.order is None and self.kept_tokens + self.kept_newlines == total

    def packed_mask(self) -> Tensor:
        """Return the mask of the kept positions of the packed image, bool `[length]`."""
        newlines = self.newline_mask
        newlines = self.kept.new_zeros(self.geometry.newlines) if newlines is None else newlines.to(self.kept.device)
        return torch.cat([self.kept.flatten(), newlines])[self.geometry.to(self.kept.device).pack_index]

    def compact(self) -> Selection:
        """Return a copy of the selection without scores and mixing matrix, for long runs."""
        return replace(self, geometry=self.geometry.original, scores=None, mixing=None)

    def cpu(self) -> Selection:
        """Return the selection with its tensors on the CPU."""
        tensors = {name: getattr(self, name) for name in TENSOR_FIELDS}
        moved = {name: value.cpu() for name, value in tensors.items() if value is not None}
        numbers = {"kept": self.token_count, "newline_mask": self.newline_count}
        counts = tuple(MaskCount.of(moved[name], number) for name, number in numbers.items() if number is not None)
        return replace(self, geometry=self.geometry.original, counts=counts, **moved)

    def overlay(self, image: Image.Image | None = None) -> Image.Image:
        """Draw the kept tokens of every tile, base tile first.

        Args:
            image: the original image, to be drawn next to the tiles.

        Raises:
            ValueError: if the selection has no pixels (a run keeps the pixels of its first images only).
        """
        from tokenprune.viz import overlay

        return overlay(self, image)

    def _repr_png_(self) -> bytes | None:
        """Return the overlay as PNG for Jupyter; None without pixels."""
        from tokenprune.display import encode_png

        return None if self.pixels is None else encode_png(self.cpu().overlay())

    def _repr_html_(self) -> str:
        """Return the numbers of granted and kept tokens per tile as HTML for Jupyter, with the overlay if possible."""
        from tokenprune.display import format_image, format_table

        counts = zip(self.granted_per_tile, self.kept_per_tile, strict=True)
        rows = [[f"{tile}", f"{granted}", f"{kept}"] for tile, (granted, kept) in enumerate(counts)]
        caption = f"{self.kept_tokens} of {self.geometry.valid_tokens} tokens kept, {self.kept_newlines} newline tokens"
        table = format_table(["tile", "granted", "kept"], rows, caption)
        return table if self.pixels is None else table + format_image(self.cpu().overlay(), caption)


def top_per_tile(scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
    """Return the mask of the tokens with the largest scores of each tile.

    Args:
        scores: scores, `[tiles, tokens]`; larger scores are kept first.
        budgets: number of tokens to keep in each tile, `[tiles]`.
        candidates: tokens that may be kept, bool `[tiles, tokens]`.

    Returns:
        Kept tokens, bool `[tiles, tokens]`. Ties go to the lower index.
    """
    finite = scores.float().clamp(min=torch.finfo(torch.float32).min)  # candidates with -inf precede non-candidates
    return top_ranked(finite.masked_fill(~candidates, -torch.inf), budgets) & candidates


def top_ranked(scores: Tensor, budgets: Tensor) -> Tensor:
    """Return the mask of the largest entries of each row, bool `[rows, entries]`; ties go to the lower index.

    Args:
        scores: scores, `[rows, entries]`.
        budgets: number of entries of each row, `[rows]`.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, positions)
    return rank < budgets.to(rank.device)[:, None]


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
    check_literal("newlines", newlines, get_args(Newlines))
    if newlines != "keep_rows":
        return torch.full((geometry.newlines,), newlines == "keep", device=kept.device)
    if not geometry.newlines:
        return kept.new_zeros(0)
    layout = geometry.to(kept.device)
    counts = torch.zeros(geometry.newlines + 1, dtype=torch.long, device=kept.device)  # last entry: tokens without row
    counts = counts.scatter_add(0, layout.token_newline, kept.flatten()[layout.token_order].long())
    return torch.where(layout.ends_row, counts[:-1] > 0, counts.sum() > 0)


def count_newlines(geometry: TileGeometry, tokens: int | None, newlines: Newlines) -> int | None:
    """Return the number of kept newline tokens if it follows from the number of kept tokens, else None.

    Args:
        geometry: the layout of the image.
        tokens: number of kept tokens; None if it would have to be read from the device.
        newlines: as in `kept_newlines`.
    """
    if newlines == "drop" or not geometry.newlines:
        return 0
    if newlines == "keep" or tokens == geometry.valid_tokens:
        return geometry.newlines
    return 0 if tokens == 0 else None


def store_row_counts(mask: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return a copy of a mask for which `count_rows` reads nothing from the device, bool `[rows, entries]`.

    A modification of the copy in place makes the numbers void.

    Args:
        mask: bool `[rows, entries]`.
        numbers: number of true entries of each row, `[rows]`.
    """
    with torch.inference_mode(False):  # an inference tensor does not count its modifications
        copy = mask.clone()
    copy.row_counts, copy.row_version = tuple(numbers), count_modifications(copy)  # type: ignore[attr-defined]
    return copy


def count_rows(mask: Tensor) -> list[int]:
    """Return the number of true entries of each row, `[rows]`; stored numbers are not read from the device.

    Args:
        mask: bool `[rows, entries]`.
    """
    numbers = getattr(mask, "row_counts", None)
    if numbers is None or mask.row_version != count_modifications(mask):  # type: ignore[attr-defined]
        return mask.sum(dim=1).tolist()
    return list(numbers)


def true_indices(mask: Tensor, number: int) -> Tensor:
    """Return the indices of the true entries in ascending order, `[number]`, as `torch.nonzero_static`.

    Args:
        mask: bool `[entries]`.
        number: number of true entries; because it is passed, nothing is read from the device.
    """
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:number]
