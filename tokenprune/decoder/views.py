"""The images at a cut as strategies read them: signals of the LLM in the layout of the tokens that are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.decoder.trace import LayerTrace, compute_attention, iterate_attention, require_traced
from tokenprune.geometry import TileGeometry
from tokenprune.image import (
    ASKED_SIGNALS,
    LLM_SIGNALS,
    LLM_TEXT_SIGNALS,
    NORMED_SIGNALS,
    DeferredTensor,
    EncodedImage,
    SignalKey,
    token_dim,
)


@dataclass(frozen=True, eq=False)
class ImagePositions:
    """The positions of one image and of its text in the width of a traced layer.

    Args:
        row: the prompt row.
        entries: positions of the visual tokens in packed order, without newline tokens, `[tokens]`.
        text: positions of the text tokens after the image: real, no placeholders, before the answer, `[text]`.
    """

    row: int
    entries: Tensor
    text: Tensor


class SignalSource(NamedTuple):
    """A traced layer and the positions in it.

    Args:
        trace: the layer; its rows are prompts.
        images: the positions of each image.
        last: position of the last text token of each row, `[rows]`.
        real: positions that are neither padding nor fillers, bool `[rows, width]`; None means all positions.
    """

    trace: LayerTrace
    images: Sequence[ImagePositions]
    last: Tensor
    real: Tensor | None = None


class _Group(NamedTuple):
    """Images with equal numbers of positions.

    Args:
        numbers: their places in the list of images.
        rows: the prompt row of each, `[n]`.
        positions: `[n, positions]`.
    """

    numbers: list[int]
    rows: Tensor
    positions: Tensor


def read_signal(
    kind: str, trace: LayerTrace, images: Sequence[ImagePositions], last: Tensor, real: Tensor | None = None
) -> list[Tensor]:
    """Return a signal of each image over its visual tokens in packed order, or over the text after the image.

    Args:
        kind: a kind of signal of the LLM.
        trace: the layer; for kinds in `ASKED_SIGNALS`, the layer of the cut on all tokens.
        images: the positions of each image.
        last: position of the last text token of each row, `[rows]`.
        real: positions that are neither padding nor fillers, bool `[rows, width]`; None means all positions.

    Returns:
        The shape in the docstring of the method of `EncodedImage` with this name, without the dimension of tiles.
    """
    return _READERS[kind](SignalSource(trace, images, last, real))


def _group_images(images: Sequence[ImagePositions], read: Callable[[ImagePositions], Sequence[Tensor]]) -> list[_Group]:
    """Return the images grouped by the lengths of their positions; a group has the positions of `read` side by side."""
    groups: dict[tuple[int, ...], list[int]] = {}
    parts = [read(image) for image in images]
    for number, positions in enumerate(parts):
        groups.setdefault(tuple(len(part) for part in positions), []).append(number)
    return [
        _Group(
            numbers,
            torch.tensor([images[number].row for number in numbers], device=images[0].entries.device),
            torch.stack([torch.cat(list(parts[number])) for number in numbers]),
        )
        for numbers in groups.values()
    ]


def _scatter_groups(
    images: Sequence[ImagePositions],
    read: Callable[[ImagePositions], Sequence[Tensor]],
    compute: Callable[[_Group], Tensor],
) -> list[Tensor]:
    """Return the values of each image, computed for all images of a group together."""
    values: dict[int, Tensor] = {}
    for group in _group_images(images, read):
        values.update(zip(group.numbers, compute(group).unbind(0), strict=True))
    return [values[number] for number in range(len(images))]


def _read_entries(image: ImagePositions) -> Sequence[Tensor]:
    return (image.entries,)


def _read_text(image: ImagePositions) -> Sequence[Tensor]:
    return (image.text,)


def _read_both(image: ImagePositions) -> Sequence[Tensor]:
    return image.entries, image.text


def _take_columns(source: SignalSource, weights: Tensor, entries: Tensor) -> Tensor:
    """Return attention weights at visual tokens, `[n, heads, queries, tokens]`."""
    index = (entries + source.trace.past)[:, None, None].expand(*weights.shape[:3], -1)
    return weights.gather(-1, index)


def _last_text_attention(source: SignalSource) -> list[Tensor]:
    rows = torch.arange(len(source.last), device=source.last.device)
    weights = compute_attention(source.trace, rows, source.last[:, None])
    return _scatter_groups(
        source.images,
        _read_entries,
        lambda group: _take_columns(source, weights[group.rows], group.positions)[:, :, 0],
    )


def _text_attention(source: SignalSource) -> list[Tensor]:
    def compute(group: _Group) -> Tensor:
        count = len(source.images[group.numbers[0]].entries)
        entries, text = group.positions[:, :count], group.positions[:, count:]
        chunks = iterate_attention(source.trace, group.rows, text)
        return torch.cat([_take_columns(source, weights, entries) for weights in chunks], dim=2)

    return _scatter_groups(source.images, _read_both, compute)


def _visual_attention(source: SignalSource) -> list[Tensor]:
    def compute(group: _Group) -> Tensor:
        chunks = iterate_attention(source.trace, group.rows, group.positions)
        parts = [_take_columns(source, weights, group.positions).sum(dim=2) for weights in chunks]
        return torch.stack(parts).sum(dim=0) / group.positions.shape[1]

    return _scatter_groups(source.images, _read_entries, compute)


def _read_keys(read: Callable[[ImagePositions], Sequence[Tensor]], source: SignalSource) -> list[Tensor]:
    key = require_traced(source.trace.key)

    def compute(group: _Group) -> Tensor:
        return key[group.rows[:, None], :, group.positions + source.trace.past].transpose(1, 2)

    return _scatter_groups(source.images, read, compute)


def _read_hidden(read: Callable[[ImagePositions], Sequence[Tensor]], source: SignalSource) -> list[Tensor]:
    hidden = require_traced(source.trace.hidden)
    return _scatter_groups(source.images, read, lambda group: hidden[group.rows[:, None], group.positions])


def _rotary_similarity(source: SignalSource) -> list[Tensor]:
    rotary = require_traced(source.trace.rotary).float()
    scale = (rotary.shape[-1] / 2) ** -0.5

    def compute(group: _Group) -> Tensor:
        count = len(source.images[group.numbers[0]].entries)
        rows = group.rows[:, None] if len(rotary) > 1 else torch.zeros_like(group.rows)[:, None]
        vectors = rotary[rows, group.positions]
        return scale * (vectors[:, count:] @ vectors[:, :count].transpose(1, 2))[:, None]

    return _scatter_groups(source.images, _read_both, compute)


def _token_transition(source: SignalSource) -> list[Tensor]:
    transition = require_traced(source.trace.transition)
    ratio, distance = transition.unbind(dim=-1)
    if source.real is not None:
        distance = distance.masked_fill(~source.real[..., None], -torch.inf)
    total = (ratio * distance.softmax(dim=1)).sum(dim=-1, keepdim=True)
    return _scatter_groups(source.images, _read_entries, lambda group: total[group.rows[:, None], group.positions])


_READERS: Mapping[str, Callable[[SignalSource], list[Tensor]]] = {
    "last_text_attention": _last_text_attention,
    "asked_last_attention": _last_text_attention,
    "unrotated_attention": _last_text_attention,
    "text_attention": _text_attention,
    "asked_text_attention": _text_attention,
    "visual_attention": _visual_attention,
    "asked_visual_attention": _visual_attention,
    "llm_keys": partial(_read_keys, _read_entries),
    "asked_keys": partial(_read_keys, _read_entries),
    "text_keys": partial(_read_keys, _read_text),
    "llm_hidden": partial(_read_hidden, _read_entries),
    "text_hidden": partial(_read_hidden, _read_text),
    "normed_hidden": partial(_read_hidden, _read_entries),
    "normed_text_hidden": partial(_read_hidden, _read_text),
    "token_transition": _token_transition,
    "rotary_similarity": _rotary_similarity,
}
"""The function that computes each kind of signal."""


def unpack_signals(kind: str, values: Sequence[Tensor], layouts: Sequence[TileGeometry]) -> list[Tensor]:
    """Return a signal of each image in the order of tiles, `[tiles, ...]`; tokens that are not left are zero.

    Args:
        kind: the kind of the signal; signals of the text stay as they are.
        values: the signal of each image over its visual tokens in packed order, as `read_signal` returns it.
        layouts: the layout of each image, restricted to the tokens that are left.
    """
    if kind in LLM_TEXT_SIGNALS:
        return list(values)
    dim = token_dim(kind)  # a batch dimension takes the place of tiles
    groups: dict[tuple[TileGeometry, tuple[int, ...]], list[int]] = {}
    for number, (value, layout) in enumerate(zip(values, layouts, strict=True)):
        groups.setdefault((layout.original, tuple(value.shape)), []).append(number)
    unpacked: dict[int, Tensor] = {}
    for (original, _), numbers in groups.items():
        packed = torch.stack([values[number] for number in numbers])
        layout = original.to(packed.device)
        shape = list(packed.shape)
        shape[dim] = layout.tiles * layout.tokens
        tokens = packed.new_zeros(shape).index_copy(dim, layout.token_order, packed)
        tiles = tokens.unflatten(dim, (layout.tiles, layout.tokens)).movedim(dim, 1)
        unpacked.update(zip(numbers, tiles.unbind(0), strict=True))
    return [unpacked[number] for number in range(len(values))]


def build_views(
    layouts: Sequence[TileGeometry],
    hidden: SignalSource,
    sources: Mapping[SignalKey, SignalSource],
    layers: int,
    cut: int,
    before: int,
    encoded: Sequence[EncodedImage] | None = None,
) -> list[EncodedImage]:
    """Return the images at a cut: features are the hidden states that enter the layer of the cut.

    Args:
        layouts: the layout of each image, restricted to the tokens that are left.
        hidden: the positions in the input of the layer of the cut, and a trace with this input.
        sources: the traced layer of each signal by (kind, layer); a kind of `ASKED_SIGNALS` has the layer of the cut.
        layers: number of layers of the LLM.
        cut: the layer of the cut.
        before: the layer that the layer choice ``"before"`` selects.
        encoded: the encoded images with signals of the vision tower; None without them.
    """

    @cache
    def read_features() -> list[Tensor]:
        return unpack_signals("llm_hidden", read_signal("llm_hidden", *hidden), layouts)

    signals: list[dict[SignalKey, Tensor]] = [{} for _ in layouts]
    for (kind, layer), source in sources.items():
        parts = unpack_signals(kind, read_signal(kind, *source), layouts)
        for image_signals, value in zip(signals, parts, strict=True):
            image_signals[kind, layer] = value
    at_cut = ASKED_SIGNALS | NORMED_SIGNALS
    depths = {kind: (layers, cut if kind in at_cut else before) for kind in LLM_SIGNALS}
    device = require_traced(hidden.trace.hidden).device
    views = []
    for number, (layout, values) in enumerate(zip(layouts, signals, strict=True)):
        compute = DeferredTensor(lambda number=number: read_features()[number])  # type: ignore[misc]
        if encoded is None:
            view = EncodedImage(layout, compute_features=compute, device=device)
        else:
            view = replace(encoded[number], geometry=layout, compute_features=compute, device=device)
        views.append(view.with_signals(values, depths))
    return views
