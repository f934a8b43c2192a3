"""The positions of a prompt and of its images, and the inputs of the layer of a cut."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.caches import find_cache
from tokenprune.decoder.narrow_cache import find_cache_layer, is_narrow
from tokenprune.decoder.placement import Entries, narrow_mask
from tokenprune.decoder.trace import LayerTrace
from tokenprune.decoder.views import ImagePositions, SignalSource
from tokenprune.geometry import TileGeometry, share_layouts
from tokenprune.image import EncodedImage
from tokenprune.packing import position_tables
from tokenprune.selection import true_indices


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """The positions of a prompt as it enters the LLM.

    Args:
        placeholders: positions of the tokens of images, bool `[rows, length]`.
        mask: attention mask of the prompt; its last columns belong to these positions.
        tokens: number of real positions of each row.
        layouts: the layout of each image, restricted to the tokens that enter the LLM.
        row_of_image: the prompt row of each image.
        labels: labels of a loss, `[rows, length]`; None without a loss.
        past: length of the sequence in the cache.
    """

    placeholders: Tensor
    mask: Tensor
    tokens: Sequence[int]
    layouts: Sequence[TileGeometry]
    row_of_image: Sequence[int]
    labels: Tensor | None = None
    past: int = 0

    @cached_property
    def is_real(self) -> Tensor:
        """Positions that are not padding, bool `[rows, length]`; all, if the mask is prepared for a kernel."""
        if self.mask.dim() != 2:
            return torch.ones_like(self.placeholders)
        return self.mask[:, -self.placeholders.shape[1] :].to(self.placeholders.device).bool()

    @cached_property
    def text(self) -> list[Tensor]:
        """Positions of the text after each image, before the first label, `[text]` each; read from the device once.

        Of an image without tokens it is all text of the row.
        """
        placeholders, is_real, last = self.placeholders.cpu(), self.is_real.cpu(), self.last.cpu()
        positions, text = torch.arange(placeholders.shape[1]), []
        image_positions = placeholders.nonzero()[:, 1].split([len(layout.packed) for layout in self.layouts])
        for row, image in zip(self.row_of_image, image_positions, strict=True):
            end = int(image[-1]) if len(image) else -1
            is_text = is_real[row] & ~placeholders[row] & (positions > end) & (positions <= last[row])
            text.append(positions[is_text].to(self.placeholders.device))
        return text

    @property
    def image_positions(self) -> int:
        """Number of positions of all images."""
        return sum(len(layout.packed) for layout in self.layouts)

    @cached_property
    def last(self) -> Tensor:
        """Position of the last token of the prompt of each row, before the first label, `[rows]`."""
        positions = torch.arange(self.is_real.shape[1], device=self.is_real.device)
        real = self.is_real
        if self.labels is not None:
            has_label = (self.labels != -100).long().cumsum(dim=1) > 0
            before = real & ~has_label
            real = torch.where(before.any(dim=1, keepdim=True), before, real)
        return positions.expand_as(real).masked_fill(~real, -1).amax(dim=1)


@dataclass(frozen=True, eq=False)
class CutView:
    """What the tokens of the images are at a cut, before the strategy reads it.

    Args:
        cuts: the first layer of each cut.
        images: the encoded images, with signals of the vision tower.
        layouts: the layout of each image, restricted to the tokens that are left.
        row_of_image: the prompt row of each image.
        positions: the prompt position of each position of the packed images, `[positions]`.
        hidden: hidden states that enter the layer of the cut, `[rows, length, dim]`.
        prompt: the positions of the prompt.
        entries: the entries behind each earlier cut; None where layers run on all positions.
        traces: what earlier layers computed, by layer index.
        repeats: how often each prompt row is repeated in the inputs of the layer.
        args: positional inputs of the layer.
        kwargs: keyword inputs of the layer.
    """

    cuts: Sequence[int]
    images: Sequence[EncodedImage]
    layouts: Sequence[TileGeometry]
    row_of_image: Sequence[int]
    positions: Tensor
    hidden: Tensor
    prompt: PromptLayout
    entries: Sequence[Entries | None]
    traces: Mapping[int, LayerTrace]
    repeats: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def lengths(self) -> list[int]:
        """Number of packed positions of each image."""
        return [len(layout.packed) for layout in self.layouts]

    @property
    def token_counts(self) -> list[int]:
        """Number of visual tokens of each image that are left."""
        return [layout.valid_tokens for layout in self.layouts]

    @cached_property
    def token_index(self) -> Tensor:
        """Index of each visual token among the packed positions of all images, `[tokens]`."""
        _, is_token = position_tables(tuple(self.layouts), self.positions.device)
        return true_indices(is_token, sum(self.token_counts))

    @cached_property
    def token_positions(self) -> Tensor:
        """The prompt position of each visual token, `[tokens]`."""
        return self.positions[self.token_index]

    @cached_property
    def token_rows(self) -> Tensor:
        """The prompt row of each visual token, `[tokens]`."""
        return self.rows[self.token_index]

    def entries_of(self, layer: int) -> Entries | None:
        """Return the entries of a layer that ran, or of the inputs of the layer of this cut; None for all positions.

        Args:
            layer: index of the layer.
        """
        earlier = min(bisect_right(self.cuts, layer), len(self.entries))
        return self.entries[earlier - 1] if earlier else None

    def locate(self, trace: LayerTrace, layer: int, reads_text: bool) -> SignalSource:
        """Return a traced layer with the positions of the images in it.

        Args:
            trace: what the layer computed.
            layer: index of the layer.
            reads_text: whether the text after the images is read.
        """
        prompt, entries = self.prompt, self.entries_of(layer)
        text = prompt.text if reads_text else [self.positions[:0]] * len(self.layouts)
        last, positions = prompt.last, self.token_positions
        if entries is None:
            later = self.hidden.shape[1] - prompt.is_real.shape[1]
            is_real = F.pad(prompt.is_real, (0, later)) if later else prompt.is_real
        else:
            source = entries.source
            positions = source[self.token_rows, positions]
            last = source.gather(1, last[:, None])[:, 0]
            text = [source[row, part] for row, part in zip(self.row_of_image, text, strict=True)]
            is_real = torch.ones_like(entries.index, dtype=torch.bool)
            is_real = is_real if entries.is_filler is None else ~entries.is_filler
        parts = zip(self.row_of_image, positions.split(self.token_counts), text, strict=True)
        return SignalSource(trace, [ImagePositions(*part) for part in parts], last, is_real)

    @property
    def layer_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of the layer of this cut for the tokens that are left, of the first repetition of each row.

        Keys of earlier turns remain if the layer stores all of them.
        """
        entries, kwargs = self.entries[-1] if self.entries else None, dict(self.kwargs)
        hidden = self.hidden if entries is None else entries.take(self.hidden)
        cache_layer = find_cache_layer(find_cache(kwargs), self.cuts[len(self.entries)])
        keeps_cache = self.prompt.past > 0 and entries is None and self.repeats == 1 and not is_narrow(cache_layer)
        rotary = kwargs.get("position_embeddings")
        if rotary is not None:
            parts = rotary if isinstance(rotary, tuple) else (rotary,)
            rows = [part if part.shape[-3] == 1 else part[..., :: self.repeats, :, :] for part in parts]
            rows = rows if entries is None else [entries.take_rotary(part) for part in rows]
            kwargs["position_embeddings"] = tuple(rows) if isinstance(rotary, tuple) else rows[0]
        if (ids := kwargs.get("position_ids")) is not None:
            ids = ids if ids.shape[-2] == 1 else ids[..., :: self.repeats, :]
            kwargs["position_ids"] = ids if entries is None else entries.take_ids(ids)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor):
            mask = mask[:: self.repeats] if len(mask) > 1 else mask
            if not keeps_cache:
                mask = mask[..., self.prompt.past : self.prompt.past + self.hidden.shape[1]]
            if entries is not None:
                mask = narrow_mask(mask, entries.index, entries.index, entries.is_filler, "bool")
            kwargs["attention_mask"] = mask
        if not keeps_cache:
            kwargs |= {name: None for name in ("cache", "past_key_values") if name in kwargs}
        if self.args:
            return (hidden, *self.args[1:]), kwargs
        return (), {**kwargs, "hidden_states": hidden}

    @cached_property
    def rows(self) -> Tensor:
        """The prompt row of each packed position, `[positions]`."""
        return expand_rows(tuple(self.row_of_image), tuple(self.lengths), self.positions.device)


@lru_cache(maxsize=256)
def expand_rows(row_of_image: tuple[int, ...], lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the prompt row of each packed position, `[positions]`.

    Args:
        row_of_image: the prompt row of each image.
        lengths: number of packed positions of each image.
        device: the device of the result.
    """
    with torch.inference_mode(False):  # a later call may record gradients
        numbers = [row for row, length in zip(row_of_image, lengths, strict=True) for _ in range(length)]
        return torch.tensor(numbers, dtype=torch.long, device=device)


def restrict_layouts(layouts: Sequence[TileGeometry], kept: Sequence[Tensor] | None) -> list[TileGeometry]:
    """Return the layouts of the tokens that enter the LLM, in their order; the positions are read from the device.

    Args:
        layouts: the layout of each image.
        kept: the position of each token that enters the LLM in its packed image; None if all enter.
    """
    if kept is None:
        return list(layouts)
    order = torch.cat(list(kept)).cpu().split([len(positions) for positions in kept])
    return share_layouts([replace(g, packed=g.packed[index]) for g, index in zip(layouts, order, strict=True)])
