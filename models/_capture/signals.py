"""Pure functions that turn captured tensors into the signals of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from tokenprune.geometry import TileGeometry
from tokenprune.image import ALIGNED_FROM, ALIGNED_SIGNALS, CLS_SIGNALS, ROW_SIGNALS, Signal, SignalKey, token_dim
from tokenprune.models._capture.hooks import resolve_signals


def list_captured_signals(needs: Iterable[Signal], layers: int, feature_layer: int) -> dict[int, set[str]]:
    """Return the kinds of signals to capture per layer index, including the sources of aligned signals.

    Args:
        needs: the declared signals.
        layers: number of layers of the tower.
        feature_layer: index of the layer whose output the model uses.

    Raises:
        ValueError: if a signal names a layer that the tower does not have.
    """
    kinds_by_layer = resolve_signals(needs, layers, feature_layer)
    for kinds in kinds_by_layer.values():
        kinds |= {source for aligned, source in ALIGNED_FROM.items() if aligned in kinds}
    return kinds_by_layer


def is_captured(kind: str, kinds_by_layer: Mapping[int, set[str]]) -> bool:
    """Return whether a kind of signal is captured in any layer."""
    return any(kind in kinds for kinds in kinds_by_layer.values())


def align_signals(
    signals: Mapping[SignalKey, list[Tensor]],
    kinds_by_layer: Mapping[int, set[str]],
    align: Callable[[Tensor], Tensor],
) -> dict[SignalKey, list[Tensor]]:
    """Return the required signals that are aligned with text, one tensor per image each.

    Args:
        signals: the captured signals, which contain the sources of the aligned signals.
        kinds_by_layer: the kinds of signals to capture per layer index.
        align: maps hidden states of the tower to the space shared with text.
    """
    return {
        (kind, layer): [align(source) for source in signals[ALIGNED_FROM[kind], layer]]
        for layer, kinds in kinds_by_layer.items()
        for kind in kinds & ALIGNED_SIGNALS
    }


def split_sequence(
    kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], pooling: int, order: Tensor | None
) -> list[Tensor]:
    """Return a signal for each image, `[1, ...]`, if the tower runs over all images as one sequence.

    Args:
        kind: the kind of the signal.
        captured: consecutive parts of the sequence, of any length.
        layouts: the layouts of the images.
        pooling: number of patches along a side of a token.
        order: the index of each patch in the sequence, `[patches]`; None if the order is the same.
    """
    dim = token_dim(kind)
    sequence = torch.cat(list(captured), dim)
    patches = 1 if kind == "projector_inputs" else pooling**2
    if order is not None:
        sequence = sequence.index_select(dim, order.to(sequence.device))
    return list(sequence.split([layout.tokens * patches for layout in layouts], dim))


@lru_cache(maxsize=256)
def base_first_order(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the indices that move the last tile of each image, its base tile, before its other tiles, `[tiles]`.

    Args:
        lengths: number of tiles of each image.
        device: the device of the table.
    """
    with torch.inference_mode(False):  # a later call may record gradients
        tiles = torch.arange(sum(lengths)).split(lengths)
        return torch.cat([part.roll(1) for part in tiles]).to(device)


def expand_tokens(kept: Tensor, token_grid: tuple[int, int], pooling: int, order: str) -> Tensor:
    """Return the mask of the patches of kept tokens, bool `[patches]`.

    Args:
        kept: the kept tokens of one tile, bool `[1, tokens]`.
        token_grid: height x width of the tokens of a tile.
        pooling: number of patches along a side of a token.
        order: order of the patches as an einops pattern.
    """
    sizes = {"h": token_grid[0], "w": token_grid[1], "p": pooling, "q": pooling}
    return repeat(kept[0], f"(h w) -> {order}", **sizes)


def pool_patches(kind: str, value: Tensor, token_grid: tuple[int, int], pooling: int, order: str) -> Tensor:
    """Return a signal with tokens in place of patches: attention is summed, vectors are averaged.

    Logits are pooled by logsumexp, so that their softmax is summed. Signals without patches are returned unchanged.

    Args:
        kind: the kind of the signal.
        value: the signal, `[tiles, heads, patches]` or `[tiles, (heads,) patches, dim]`.
        token_grid: height x width of the tokens of a tile.
        pooling: number of patches along a side of a token.
        order: order of the patches as an einops pattern.
    """
    if pooling == 1 or kind in CLS_SIGNALS or kind == "projector_inputs":
        return value
    sizes = {"h": token_grid[0], "w": token_grid[1], "p": pooling, "q": pooling}
    if kind == "cls_logits":
        return rearrange(value, f"tiles heads {order} -> tiles heads (h w) (p q)", **sizes).logsumexp(dim=-1)
    if kind in ROW_SIGNALS:
        return reduce(value, f"tiles heads {order} -> tiles heads (h w)", "sum", **sizes)
    heads = "heads " if value.dim() == 4 else ""
    return reduce(value, f"tiles {heads}{order} dim -> tiles {heads}(h w) dim", "mean", **sizes)
