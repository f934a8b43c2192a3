"""From model inputs and selections to shorter model inputs. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

TEXT_INPUTS: Mapping[str, int] = {"inputs_embeds": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
"""Inputs with one entry per prompt position besides ids and mask, and what fills their padding."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The positions of the full prompt that remain in each row of the reduced prompt.

    Args:
        index: position in the full prompt of each position of the reduced one, `[rows, width]`.
        mask: which positions of the reduced prompt are real, bool `[rows, width]`; the others are padding.
        length: width of the full prompt.
    """

    index: Tensor
    mask: Tensor
    length: int

    @classmethod
    def unchanged(cls, mask: Tensor) -> Rows:
        """Return the rows of a prompt that nothing was dropped from.

        Args:
            mask: real positions, `[rows, length]`.
        """
        length = mask.shape[1]
        return cls(torch.arange(length, device=mask.device).expand(len(mask), length), mask.bool(), length)

    def take(self, value: Tensor, fill: float) -> Tensor:
        """Return the kept positions of a tensor of the full prompt, padding filled, `[rows, width, ...]`.

        Args:
            value: `[rows, length, ...]`.
            fill: the value at padding.
        """
        index, mask = self.index, self.mask
        for _ in range(value.dim() - 2):
            index, mask = index.unsqueeze(-1), mask.unsqueeze(-1)
        kept = value.gather(1, index.expand(*self.index.shape, *value.shape[2:]))
        return kept.masked_fill(~mask, fill)

    @cached_property
    def source(self) -> Tensor:
        """The position in the reduced prompt that each position of the full prompt reads, `[rows, length]`.

        That of the last kept position at or before it; the first kept one if there is none.
        """
        kept = torch.zeros(len(self.index), self.length, dtype=torch.long, device=self.index.device)
        kept = kept.scatter_add(1, self.index, self.mask.long())  # padding adds 0
        first = self.mask.long().argmax(dim=1, keepdim=True)
        return (kept.cumsum(dim=1) - 1).clamp(min=0) + first

    def expand(self, value: Tensor, last: int = 0) -> Tensor:
        """Return a tensor of the reduced prompt at the length of the full one, `[rows, length, ...]`.

        A dropped position shows the value of the last kept position at or before it. So a loss over text that follows
        an image equals that of the reduced prompt.

        Args:
            value: `[rows, width, ...]`, or its last positions only.
            last: how many of the last positions to return; 0 returns all.
        """
        source = self.source[:, -last:] - (self.index.shape[1] - value.shape[1])
        index = source.clamp(min=0).to(value.device)
        for _ in range(value.dim() - 2):
            index = index.unsqueeze(-1)
        return value.gather(1, index.expand(*source.shape, *value.shape[2:]))

    def cpu(self) -> Rows:
        """Return the same rows on the CPU."""
        return Rows(self.index.cpu(), self.mask.cpu(), self.length)


def align(value: Tensor, rows: Rows, fill: float = 0) -> Tensor:
    """Return a tensor of the full prompt at the positions that remain in the reduced one, `[rows, width, ...]`.

    For labels (``fill=-100``), masks and weights that belong to outputs of reduced length
    (``reducer(model, outputs="reduced")``), to the returned cache, or to attention maps.

    Args:
        value: `[rows, length, ...]`.
        rows: the rows of the call: `run.rows`.
        fill: the value at padding.

    Raises:
        ValueError: if the tensor is not of the full prompt's length.
    """
    if value.dim() < 2 or value.shape[0] != len(rows.index) or value.shape[1] != rows.length:
        raise ValueError(
            f"align needs a tensor of the full prompt, [{len(rows.index)}, {rows.length}, ...], not "
            f"{list(value.shape)}; pass the labels or the mask that belong to the call which run.rows describes"
        )
    return Rows(rows.index.to(value.device), rows.mask.to(value.device), rows.length).take(value, fill)


TextSeparatorSide: TypeAlias = Literal["none", "before", "after"]
"""Whether text between two stretches of placeholders of one image opens the second (``"before"`` it), closes the first
(``"after"`` it), or there is ``"none"`` that belongs to either."""


def emptied_text(placeholders: Tensor, kept: Tensor, lengths: Sequence[int], side: TextSeparatorSide) -> Tensor:
    """Return the text that separates rows or tiles inside an image of which nothing is kept, bool `[rows, length]`.

    Text before the first and after the last placeholder of an image belongs to the whole image.

    Args:
        placeholders: image positions, bool `[rows, length]`.
        kept: which placeholders stay, in prompt order over all rows, bool `[placeholders]`.
        lengths: placeholders of each image.
        side: to which stretch of placeholders such text belongs.
    """
    total = sum(lengths)
    if side == "none" or total == 0:
        return torch.zeros_like(placeholders)
    flat = placeholders.flatten()
    image = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(flat.device)
    seen = flat.long().cumsum(dim=0)  # placeholders up to each position
    last, following = (seen - 1).clamp(min=0), seen.clamp(max=total - 1)
    inside = ~flat & (seen > 0) & (seen < total) & (image[last] == image[following])
    new = torch.cat([flat.new_zeros(1), (flat.nonzero()[:, 0].diff() != 1) | (image.diff() != 0)])
    stretch = new.long().cumsum(dim=0)
    alive = flat.new_zeros(total).index_fill(0, stretch[kept.to(flat.device)], True)
    owner = stretch[last if side == "after" else following]
    return (inside & ~alive[owner]).view_as(placeholders)


def shorter_rows(
    placeholders: Tensor,
    attention_mask: Tensor,
    kept: Tensor,
    side: Literal["left", "right"],
    spare: int = 0,
    dropped_text: Tensor | None = None,
) -> Rows:
    """Return which positions of a batch of prompts stay.

    Old padding goes; the new width is that of the longest row.

    Args:
        placeholders: image positions, bool `[rows, length]`.
        attention_mask: real positions, `[rows, length]`.
        kept: which placeholders stay, in prompt order over all rows, bool `[placeholders]`.
        side: where padding goes.
        spare: columns of padding to add beyond that.
        dropped_text: text positions that go, bool `[rows, length]`; None drops none.
    """
    stays = attention_mask.bool() & ~placeholders
    stays = stays if dropped_text is None else stays & ~dropped_text
    stays = stays.masked_scatter(placeholders, kept.to(stays.device)) & attention_mask.bool()
    counts = stays.sum(dim=1, keepdim=True)
    width = int(counts.max()) + spare
    order = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    column = torch.arange(width, device=stays.device).expand(len(stays), width)
    source = column - (width - counts) if side == "left" else column
    mask = (source >= 0) & (source < counts)
    return Rows(order.gather(1, source.clamp(0, order.shape[1] - 1)) * mask, mask, order.shape[1])


def padding_side(attention_mask: Tensor, has_labels: bool) -> Literal["left", "right"]:
    """Return the side on which a batch is padded; unpadded batches count as right-padded when they train.

    Args:
        attention_mask: real positions, `[rows, length]`.
        has_labels: whether the call computes a loss.
    """
    if bool((attention_mask[:, -1] == 0).any()):
        return "right"
    return "right" if has_labels and bool((attention_mask[:, 0] != 0).all()) else "left"


def shorten(inputs: Mapping[str, Any], rows: Rows, pad_token_id: int) -> dict[str, Any]:
    """Return the text side of the model inputs with only the kept positions.

    Args:
        inputs: model inputs of the call.
        rows: what stays.
        pad_token_id: id that fills padding.
    """
    out = dict(inputs)
    if inputs.get("input_ids") is not None:
        out["input_ids"] = rows.take(inputs["input_ids"], pad_token_id)
    for name, fill in TEXT_INPUTS.items():
        if inputs.get(name) is not None:
            out[name] = rows.take(inputs[name], fill)
    out["attention_mask"] = rows.mask.long()
    return out


def counted_positions(mask: Tensor) -> Tensor:
    """Return position ids that count the real positions of each row, 0 at left padding, `[rows, width]`.

    Args:
        mask: real positions, bool `[rows, width]`.
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def kept_positions(position_ids: Tensor, rows: Rows) -> Tensor:
    """Return the position ids of the kept positions, 0 at padding, `[..., rows, width]`.

    Args:
        position_ids: ids of the full prompt, `[..., rows, length]`.
        rows: what stays.
    """
    index = rows.index.expand(*position_ids.shape[:-2], *rows.index.shape)
    return position_ids.gather(-1, index).masked_fill(~rows.mask, 0)
