"""Truncated encoding: the vision tower stops after the last required layer, the projector runs on kept tokens only.

The tower's own `forward` runs once, for all tiles. If each visual token depends on its own patches only, a hook leaves
the tower after the last required layer. The projector then maps the outputs of the feature layers to visual tokens, for
kept tokens only. In all other families the model's `get_image_features` runs with the layers after the last required
layer replaced by the identity, and with an unused pooling head skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.adapter import PackedTokens, VisualTokens
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.models._capture.hooks import replaced_forward
from tokenprune.packing import KeptPositions

if TYPE_CHECKING:
    from tokenprune.models._base.placeholder import PlaceholderAdapter


class _TowerExitError(BaseException):  # handlers of errors inside the tower must not catch it
    """Raised by a hook to leave the tower after its last required layer."""


def run_until(forward: Callable[[], Any], layers: Sequence[nn.Module], last: int, read: Sequence[int]) -> list[Tensor]:
    """Run a tower up to a layer and return the outputs of the layers `read`, `[tiles, sequence, width]` each.

    Args:
        forward: runs the tower's own `forward`.
        layers: the layers of the tower.
        last: index of the layer after which the tower stops.
        read: indices of the layers whose outputs are returned, at most `last`.
    """
    outputs: dict[int, Tensor] = {}

    def store(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        raise _TowerExitError

    with ExitStack() as hooks:
        for index in dict.fromkeys(read):
            hooks.callback(layers[index].register_forward_hook(store(index)).remove)
        hooks.callback(layers[last].register_forward_hook(leave).remove)  # registered last, so it runs last
        with suppress(_TowerExitError):
            forward()
    return [outputs[index] for index in read]


@contextmanager
def skipped_layers(layers: Sequence[nn.Module], last: int, pooling_head: nn.Module | None = None) -> Iterator[None]:
    """Skip the layers after the last required one, and an unused pooling head, inside the block.

    Args:
        layers: the layers of the tower.
        last: index of the last required layer.
        pooling_head: a pooling head whose output is not read; None if there is no such head.
    """
    with ExitStack() as undo:
        for layer in layers[last + 1 :]:
            undo.enter_context(replaced_forward(layer, lambda hidden, *args, **kwargs: hidden))
        if pooling_head is not None:
            undo.enter_context(replaced_forward(pooling_head, lambda hidden_state, **kwargs: hidden_state[:, 0]))
        yield


class ProjectedTokens(VisualTokens):
    """Visual tokens that are projected on request: all tokens, or the kept tokens only.

    Args:
        adapter: the adapter of the model.
        layouts: the layouts of the images; all have the same token grid.
        hidden: the outputs of the feature layers side by side, without CLS, `[tiles, patches, width]`.
    """

    def __init__(self, adapter: PlaceholderAdapter, layouts: Sequence[TileGeometry], hidden: Tensor) -> None:
        self.adapter, self.layouts, self.hidden = adapter, layouts, hidden
        self.device = torch.device("cpu") if hidden.is_meta else hidden.device  # the CPU reads the indices

    def all(self) -> list[Tensor]:
        """Return all tokens of each image, newline tokens included, `[length, dim]` each."""
        return self._packed

    @cached_property
    def _packed(self) -> list[Tensor]:
        flat = self.adapter.project_tiles(self.hidden, self._patches)
        lengths = [len(layout.packed) for layout in self.layouts]
        return list(insert_newlines(flat, self._tower_index, self.adapter.newline).split(lengths))

    def gather(self, kept_positions: KeptPositions) -> list[Tensor]:
        """Return the kept tokens of each image, `[kept, dim]` each; only these pass the projector."""
        number = sum(kept_positions.tokens)
        if "_packed" in vars(self) or not number:  # projected already, or no token
            return PackedTokens(self._packed).gather(kept_positions)
        tokens, has_newlines = self.layouts[0].tokens, bool(sum(kept_positions.newlines))
        index = self._tower_index[kept_positions.index.to(self.device)]
        token_index = kept_positions.token_index.to(self.device) if has_newlines else None
        index = index if token_index is None else index[token_index]
        flat = self.adapter.project_patches(self.hidden[(index // tokens)[:, None], self._patches[index % tokens]])
        newline = self.adapter.newline
        if token_index is not None and newline is not None:
            newlines = newline.to(flat.dtype).expand(sum(kept_positions.lengths), -1)
            flat = newlines.index_copy(0, token_index, flat)
        return list(flat.split(kept_positions.lengths))

    @cached_property
    def _patches(self) -> Tensor:
        """Indices of the patches of each token of a tile, row by row, `[tokens, patches]`."""
        return patch_table(self.layouts[0].token_grid, self.adapter.pooling, self.adapter.patch_order, self.device)

    @cached_property
    def _tower_index(self) -> Tensor:
        """Index of the token at each packed position in the tower output, `[positions]`; -1 for a newline token."""
        return tower_index_table(tuple(self.layouts), self.adapter.base_first, self.device)


@lru_cache(maxsize=256)
def patch_table(token_grid: tuple[int, int], pooling: int, order: str, device: torch.device) -> Tensor:
    """Return the indices of the patches of each token of a tile, row by row, `[tokens, patches]`.

    Args:
        token_grid: height x width of the tokens of a tile.
        pooling: number of patches along a side of a token.
        order: order of the patches of a tile in the tower, as in `PlaceholderAdapter.patch_order`.
        device: the device of the table.
    """
    sizes = {"h": token_grid[0], "w": token_grid[1], "p": pooling, "q": pooling}
    with torch.inference_mode(False):  # a later call may record gradients
        index = torch.arange(token_grid[0] * token_grid[1] * pooling**2)
        return rearrange(index, f"{order} -> (h w) (p q)", **sizes).to(device)


@lru_cache(maxsize=256)
def tower_index_table(layouts: tuple[TileGeometry, ...], base_first: bool, device: torch.device) -> Tensor:
    """Return the index of the token at each packed position in the tower output, `[positions]`; -1 for newline tokens.

    Args:
        layouts: the layout of each image.
        base_first: whether the base tile is encoded before the sub-images, or after them.
        device: the device of the table.
    """
    out, start = [], 0
    with torch.inference_mode(False):  # a later call may record gradients
        for layout in (layout.original for layout in layouts):
            packed, total = layout.packed, layout.tiles * layout.tokens
            in_tower_order = packed if base_first else (packed - layout.tokens) % total
            out.append(torch.where(packed == NEWLINE, packed, in_tower_order + start))
            start += total
        return torch.cat(out).to(device)


def insert_newlines(tokens: Tensor, index: Tensor, newline: Tensor | None) -> Tensor:
    """Return visual tokens and newline tokens as they enter the LLM, `[length, dim]`.

    Args:
        tokens: the visual tokens, `[n, dim]`.
        index: index of the visual token at each position, or `NEWLINE` for a newline token, `[length]`.
        newline: the newline token, `[dim]`; None if the model has no newline token.
    """
    packed = tokens[index.clamp(min=0)]
    if newline is None:
        return packed
    return torch.where(index[:, None] == NEWLINE, newline.to(packed.dtype), packed)
