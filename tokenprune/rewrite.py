"""Pure functions that shorten model inputs to the positions that a selection keeps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.selection import true_indices

TEXT_INPUTS: Mapping[str, int] = {"inputs_embeds": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
"""Inputs with one entry per prompt position, besides ids and mask, and the value that fills their padding."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The positions of the full prompt that remain in each row of the reduced prompt.

    Args:
        index: position in the full prompt of each position of the reduced one, `[rows, width]`.
        mask: positions of the reduced prompt that are not padding, bool `[rows, width]`.
        length: width of the full prompt.
    """

    index: Tensor
    mask: Tensor
    length: int

    @classmethod
    def unchanged(cls, mask: Tensor) -> Rows:
        """Return the rows of a prompt without dropped positions.

        Args:
            mask: attention mask of the prompt, `[rows, length]`.
        """
        length = mask.shape[1]
        return cls(torch.arange(length, device=mask.device).expand(len(mask), length), mask.bool(), length)

    def pad_left(self, multiple: int) -> Rows:
        """Return the rows with padding on the left up to the next width that is a multiple of a number.

        Args:
            multiple: the number.
        """
        padding = (-self.index.shape[1] % multiple, 0)
        if padding == (0, 0):
            return self
        return Rows(F.pad(self.index, padding), F.pad(self.mask, padding), self.length)

    def take(self, value: Tensor, fill: float) -> Tensor:
        """Return the values of a full-prompt tensor at the kept positions, `[rows, width, ...]`.

        Args:
            value: tensor of the full prompt, `[rows, length, ...]`.
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

        This is the last kept position at or before it, or the first kept position if there is none.
        """
        kept = torch.zeros(len(self.index), self.length, dtype=torch.long, device=self.index.device)
        kept = kept.scatter_add(1, self.index, self.mask.long())  # padding adds 0
        first = self.mask.long().argmax(dim=1, keepdim=True)
        return (kept.cumsum(dim=1) - 1).clamp(min=0) + first

    def expand(self, value: Tensor, last: int = 0) -> Tensor:
        """Return a tensor of the reduced prompt, expanded to the length of the full prompt, `[rows, length, ...]`.

        A dropped position repeats the value of the last kept position at or before it. A loss over text after an image
        therefore equals the loss of the reduced prompt.

        Args:
            value: tensor of the reduced prompt, `[rows, width, ...]`, or only its last positions.
            last: number of last positions to return; 0 returns all positions.
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
    """Return the values of a full-prompt tensor at the positions of the reduced prompt, `[rows, width, ...]`.

    Use it for labels (``fill=-100``), masks and weights that belong to outputs of reduced length
    (``reducer(model, outputs="reduced")``), to the returned cache, or to attention maps.

    Args:
        value: tensor of the full prompt, `[rows, length, ...]`.
        rows: the rows of the call: `run.rows`.
        fill: the value at padding.

    Raises:
        ValueError: if the tensor does not have the length of the full prompt.
    """
    if value.dim() < 2 or value.shape[0] != len(rows.index) or value.shape[1] != rows.length:
        raise ValueError(
            f"align needs a tensor of the full prompt, [{len(rows.index)}, {rows.length}, ...], not "
            f"{list(value.shape)}; pass the labels or the mask of the call that run.rows describes"
        )
    return Rows(rows.index.to(value.device), rows.mask.to(value.device), rows.length).take(value, fill)


TextSeparatorSide: TypeAlias = Literal["none", "before", "after"]
"""Position of a text separator relative to its run of placeholders, if it lies between two runs of one image.

``"before"``: the text belongs to the second run. ``"after"``: it belongs to the first run. ``"none"``: to neither.
"""


@dataclass(frozen=True)
class PromptSummary:
    """Numbers about the prompts of a call, read from the device at once.

    Args:
        placeholders: number of image placeholders of each row.
        tokens: number of tokens of each row without padding.
        hides_images: whether the attention mask hides an image placeholder.
        ends_with_padding: whether a row ends with padding.
        starts_with_tokens: whether every row starts with a token.
    """

    placeholders: tuple[int, ...]
    tokens: tuple[int, ...]
    hides_images: bool = False
    ends_with_padding: bool = False
    starts_with_tokens: bool = True

    def find_rows(self, lengths: Sequence[int]) -> list[int]:
        """Return the prompt row of each image.

        Args:
            lengths: number of placeholders of each image, in the order of the prompts.
        """
        ends = list(accumulate(self.placeholders))
        starts = [0, *accumulate(lengths)]
        return [bisect_right(ends, start) for start in starts[: len(lengths)]]

    def padding_side(self, has_labels: bool) -> Literal["left", "right"]:
        """Return the side on which the batch is padded; an unpadded batch with labels counts as right-padded.

        Args:
            has_labels: whether the call computes a loss.
        """
        return "right" if self.ends_with_padding or (has_labels and self.starts_with_tokens) else "left"


def summarize_prompts(placeholders: Tensor, attention_mask: Tensor | None) -> PromptSummary:
    """Return numbers about the prompts of a call, with one read from the device.

    Args:
        placeholders: positions of image placeholders, bool `[rows, length]`.
        attention_mask: attention mask of the full prompts, `[rows, length]`; None if there is no padding.
    """
    if attention_mask is None:
        return PromptSummary(tuple(placeholders.sum(dim=1).tolist()), (placeholders.shape[1],) * len(placeholders))
    # The masks are small: the host computes the numbers with fewer operators on the device.
    is_image, is_token = torch.stack([placeholders, attention_mask.bool()]).cpu().numpy()
    return PromptSummary(
        tuple(is_image.sum(axis=1).tolist()),
        tuple(is_token.sum(axis=1).tolist()),
        hides_images=bool((is_image & ~is_token).any()),
        ends_with_padding=not bool(is_token[:, -1].all()),
        starts_with_tokens=bool(is_token[:, 0].all()),
    )


def find_emptied_text(placeholders: Tensor, kept: Tensor, lengths: Sequence[int], side: TextSeparatorSide) -> Tensor:
    """Return the mask of text separators that belong to rows or tiles without a kept token, bool `[rows, length]`.

    Text before the first and after the last placeholder of an image belongs to the whole image and is not included.

    Args:
        placeholders: positions of image placeholders, bool `[rows, length]`.
        kept: the kept placeholders in prompt order over all rows, bool `[placeholders]`.
        lengths: number of placeholders of each image.
        side: the run of placeholders to which a text separator belongs.
    """
    total = sum(lengths)
    if side == "none" or total == 0:
        return torch.zeros_like(placeholders)
    flat = placeholders.flatten()
    image = torch.repeat_interleave(torch.tensor(lengths)).to(flat.device)
    count = flat.long().cumsum(dim=0)  # placeholders up to each position
    last, following = (count - 1).clamp(min=0), count.clamp(max=total - 1)
    inside = ~flat & (count > 0) & (count < total) & (image[last] == image[following])
    is_start = torch.cat([flat.new_zeros(1), (true_indices(flat, total).diff() != 1) | (image.diff() != 0)])
    run = is_start.long().cumsum(dim=0)
    has_kept = torch.zeros_like(run).scatter_add(0, run, kept.to(flat.device).long()) > 0
    owner = run[last if side == "after" else following]
    return (inside & ~has_kept[owner]).view_as(placeholders)


def shorten_rows(
    placeholders: Tensor,
    attention_mask: Tensor,
    kept: Tensor,
    side: Literal["left", "right"],
    width: int,
    dropped_text: Tensor | None = None,
) -> Rows:
    """Return the positions that remain in the reduced prompts of a batch, without reading from the device.

    The padding of the full prompts is removed.

    Args:
        placeholders: positions of image placeholders, bool `[rows, length]`.
        attention_mask: attention mask of the full prompts, `[rows, length]`; it hides no placeholder.
        kept: the kept placeholders in prompt order over all rows, bool `[placeholders]`.
        side: the side on which rows are padded.
        width: width of the reduced prompts, at least the length of the longest reduced row.
        dropped_text: text positions to drop, bool `[rows, length]`; None drops no text.
    """
    remaining = attention_mask.bool() & ~placeholders
    remaining = remaining if dropped_text is None else remaining & ~dropped_text
    remaining = remaining.masked_scatter(placeholders, kept.to(remaining.device))
    length = remaining.shape[1]
    spare = max(0, width - length)  # columns of padding beyond the full prompt
    remaining = F.pad(remaining, (0, spare)) if spare else remaining
    columns = slice(-width, None) if side == "left" and width else slice(0, width)
    mask, index = remaining.to(torch.uint8).sort(dim=1, descending=side == "right", stable=True)
    mask = mask[:, columns].bool()
    return Rows(index[:, columns] * mask, mask, length)


def shorten_inputs(inputs: Mapping[str, Any], rows: Rows, pad_token_id: int) -> dict[str, Any]:
    """Return the text inputs of the model at the kept positions only.

    Args:
        inputs: model inputs of the call.
        rows: the positions that remain.
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
    """Return position ids that count the unmasked positions of each row, 0 at left padding, `[rows, width]`.

    Args:
        mask: attention mask, bool `[rows, width]`.
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def gather_position_ids(position_ids: Tensor, rows: Rows) -> Tensor:
    """Return the position ids of the kept positions, 0 at padding, `[..., rows, width]`.

    Args:
        position_ids: ids of the full prompt, `[..., rows, length]`.
        rows: the positions that remain.
    """
    index = rows.index.expand(*position_ids.shape[:-2], *rows.index.shape)
    return position_ids.gather(-1, index).masked_fill(~rows.mask, 0)


def infer_attention_mask(ids: Tensor, inputs: Mapping[str, Any], config: Any, default: Any) -> Tensor | None:
    """Return the attention mask that `generate` infers from padding, `[rows, length]`; None if it infers no mask.

    As in transformers, positions with the pad token are masked if the pad token differs from every end token.

    Args:
        ids: prompts, `[rows, length]`.
        inputs: keyword arguments of `generate`; ``pad_token_id`` and ``eos_token_id`` have precedence.
        config: the generation config of the call.
        default: the generation config of the model.
    """
    pad, eos = (
        next((v for v in (inputs.get(n), getattr(config, n, None), getattr(default, n, None)) if v is not None), None)
        for n in ("pad_token_id", "eos_token_id")
    )
    ends = torch.as_tensor([] if eos is None else eos).flatten().tolist()
    if pad is None or int(pad) in ends or not bool((ids == int(pad)).any()):
        return None
    return (ids != int(pad)).long()
