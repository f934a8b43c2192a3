"""The images at a cut inside the LLM, as a strategy reads them: hidden states as features, and signals of the LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tokenprune.decoder.trace import LayerTrace, attend, require, sum_transitions
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.image import DeferredTensor, EncodedImage, SignalKey

QUERY_CHUNK = 128
"""Number of queries whose attention to all keys is computed at once."""


@dataclass(frozen=True, eq=False)
class ImageEntries:
    """The entries of the images of a call in one decoder layer.

    Args:
        rows: the prompt row of each packed position of all images, `[positions]`.
        entries: the entry of each packed position in the layer, `[positions]`.
        layouts: the layout of each image; its packed positions are the tokens that are left.
        row_of_image: the prompt row of each image.
        last: the entry of the last prompt token of each row, `[rows]`.
        is_real: the entries that are tokens, bool `[rows, width]`.
        text: the entries of the text after each image, `[text]` each; empty if the strategy does not read them.
    """

    rows: Tensor
    entries: Tensor
    layouts: Sequence[TileGeometry]
    row_of_image: Sequence[int]
    last: Tensor
    is_real: Tensor
    text: Sequence[Tensor]

    @property
    def lengths(self) -> list[int]:
        """Number of packed positions of each image."""
        return [len(layout.packed) for layout in self.layouts]

    def take(self, value: Tensor) -> list[Tensor]:
        """Return a value of all entries for each image, `[tiles, tokens, ...]` each; zero for tokens not left.

        Args:
            value: values of all entries, `[rows, width, ...]`.
        """
        packed = value[self.rows, self.entries].split(self.lengths)
        return [unpack(layout, part) for layout, part in zip(self.layouts, packed, strict=True)]


def unpack(layout: TileGeometry, packed: Tensor) -> Tensor:
    """Return a value of packed positions in the order of tiles, `[tiles, tokens, ...]`.

    Args:
        layout: the layout.
        packed: the values, `[length, ...]`.
    """
    if packed.dim() == 2:
        return layout.unpack(packed)
    return layout.unpack(packed.flatten(1)).unflatten(2, packed.shape[1:])


def read_last_attention(trace: LayerTrace, images: ImageEntries) -> list[Tensor]:
    """Return the attention of the last prompt token, `[tiles, heads, tokens]` per image."""
    attention = attend(trace, images.last[:, None])[:, :, 0, trace.offset :]
    return [value.movedim(2, 1) for value in images.take(attention.movedim(1, 2))]


def read_text_attention(trace: LayerTrace, images: ImageEntries) -> list[Tensor]:
    """Return the attention of the text after each image, `[tiles, heads, text, tokens]` per image."""
    out = []
    for number, (layout, entries) in enumerate(zip(images.layouts, images.entries.split(images.lengths), strict=True)):
        row = take_row(trace, images.row_of_image[number])
        keys = entries + trace.offset
        parts = [attend(row, part[None])[0, :, :, keys] for part in images.text[number].split(QUERY_CHUNK)]
        out.append(unpack(layout, torch.cat(parts, dim=1).movedim(2, 0)).movedim(1, 3))
    return out


def read_visual_attention(trace: LayerTrace, images: ImageEntries) -> list[Tensor]:
    """Return the mean attention of the visual tokens to each of them, `[tiles, heads, tokens]` per image."""
    out = []
    for number, (layout, entries) in enumerate(zip(images.layouts, images.entries.split(images.lengths), strict=True)):
        row = take_row(trace, images.row_of_image[number])
        is_token = layout.original.packed != NEWLINE
        queries = entries[is_token.nonzero()[:, 0].to(entries.device)]
        total = sum(attend(row, part[None])[0].sum(dim=1) for part in queries.split(QUERY_CHUNK))
        mean = torch.as_tensor(total)[:, entries + trace.offset] / max(len(queries), 1)
        out.append(unpack(layout, mean.t()).movedim(2, 1))
    return out


def read_keys(trace: LayerTrace, images: ImageEntries) -> list[Tensor]:
    """Return the keys of the visual tokens, `[tiles, kv_heads, tokens, head_dim]` per image."""
    return [value.movedim(2, 1) for value in images.take(require(trace.key)[:, :, trace.offset :].movedim(1, 2))]


def read_text_keys(trace: LayerTrace, images: ImageEntries) -> list[Tensor]:
    """Return the keys of the text after each image, `[kv_heads, text, head_dim]` per image."""
    key = require(trace.key)
    return [key[row][:, text + trace.offset] for row, text in zip(images.row_of_image, images.text, strict=True)]


def read_hidden(trace: LayerTrace, images: ImageEntries) -> list[Tensor]:
    """Return the input of a layer at the visual tokens, `[tiles, tokens, dim]` per image."""
    return images.take(require(trace.hidden))


def read_text_hidden(trace: LayerTrace, images: ImageEntries) -> list[Tensor]:
    """Return the input of a layer at the text after each image, `[text, dim]` per image."""
    hidden = require(trace.hidden)
    return [hidden[row, text] for row, text in zip(images.row_of_image, images.text, strict=True)]


def read_transition(trace: LayerTrace, images: ImageEntries) -> list[Tensor]:
    """Return how much a layer changes each visual token, `[tiles, tokens, 1]` per image."""
    return images.take(sum_transitions(require(trace.changes), images.is_real)[..., None])


READERS: Mapping[str, Callable[[LayerTrace, ImageEntries], list[Tensor]]] = {
    "last_text_attention": read_last_attention,
    "asked_last_attention": read_last_attention,
    "unrotated_attention": read_last_attention,
    "text_attention": read_text_attention,
    "asked_text_attention": read_text_attention,
    "visual_attention": read_visual_attention,
    "asked_visual_attention": read_visual_attention,
    "llm_keys": read_keys,
    "asked_keys": read_keys,
    "text_keys": read_text_keys,
    "llm_hidden": read_hidden,
    "text_hidden": read_text_hidden,
    "token_transition": read_transition,
}
"""Functions that read a kind of signal of the LLM from the trace of a layer."""


def take_row(trace: LayerTrace, row: int) -> LayerTrace:
    """Return the trace of one prompt row.

    Args:
        trace: the trace of all rows.
        row: number of the row.
    """
    values = {name: getattr(trace, name) for name in ("query", "key", "mask")}
    taken = {n: v[row : row + 1] if len(v) > 1 else v for n, v in values.items() if v is not None}
    return replace(trace, **taken)


def build_views(
    images: Sequence[EncodedImage],
    layouts: Sequence[TileGeometry],
    features: Sequence[Tensor],
    signals: Mapping[SignalKey, Sequence[Tensor]],
    depths: Mapping[str, tuple[int, int]],
) -> list[EncodedImage]:
    """Return the images as a strategy reads them at a cut.

    Args:
        images: the encoded images, with signals of the vision tower.
        layouts: the layout of each image, restricted to the tokens that are left.
        features: hidden states that enter the layer of the cut at the packed positions, `[length, dim]` each.
        signals: signals of the LLM by (kind, layer), one tensor per image.
        depths: number of layers and default layer by kind of signal.
    """
    views = []
    for number, (image, layout, packed) in enumerate(zip(images, layouts, features, strict=True)):
        view = replace(
            image,
            geometry=layout,
            compute_features=DeferredTensor(partial(layout.unpack, packed)),
            device=packed.device,
        )
        views.append(view.with_signals({key: parts[number] for key, parts in signals.items()}, depths))
    return views
