"""Encodes images only as far as somebody reads: what dropped tokens would have cost is not spent.

The tower's layers run one by one, up to the one that a strategy reads. Of the last needed layer only the attention rows
are made; its output projection and its MLP wait until it is known which tokens stay, and run on these alone, as does
the projector. Tiles of which nothing can stay go no further than the layer that said so. Layers behind the last needed
one, and the pooling head, do not run.

Every layer runs its own `forward` with the user's kernel. Dropped tokens still are keys and values of the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.adapter import Encoding, taken
from tokenprune.image import (
    ALIGNED_FROM,
    ALIGNED_SIGNALS,
    SEPARATOR,
    EncodedImage,
    Key,
    LazyImage,
    TileGeometry,
    WhenRead,
)
from tokenprune.models.probe import OUTPUTS, Tower, detour, probe

if TYPE_CHECKING:
    from tokenprune.models.placeholder import PlaceholderAdapter

WHOLE = OUTPUTS | ALIGNED_SIGNALS | {"projector_inputs"}
"""Kinds of signals that take the whole output of a layer."""


class _Halt(BaseException):  # no error: handlers of errors in between must not see it
    """Leaves the tower or a layer in the middle."""


class TowerRun:
    """A vision tower under way.

    Args:
        tower: where signals are found in it.
        start: runs the tower's own `forward` on some tiles, given their places among all.
        tiles: number of tiles.
        wanted: kinds of signals per layer index.
        features_at: the layers whose outputs become features.
    """

    def __init__(
        self,
        tower: Tower,
        start: Callable[[Tensor | None], Any],
        tiles: int,
        wanted: Mapping[int, set[str]],
        features_at: Sequence[int],
    ) -> None:
        self.tower, self.start, self.tiles, self.wanted = tower, start, tiles, wanted
        self.features_at = features_at
        self.last = max(features_at)
        """The last layer that features need."""
        self.end = max([self.last, *wanted])
        """The last layer that anything needs."""
        self.outputs_read = bool(wanted.get(self.end, set()) & WHOLE)
        """Whether its output is a signal; else only attention is read there."""
        self.captured: dict[Key, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.active: Tensor | None = None
        """The tiles that are still encoded, `[active]`; None is all."""
        self._depth = 0
        self._hidden: Tensor | None = None
        self._rest: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._halted: tuple[Tensor, Tensor] | None = None

    def leave_out(self, unpaid: Tensor) -> None:
        """Encode some tiles no further; the signals of deeper layers are zero there.

        Args:
            unpaid: the tiles, bool `[tiles]`.
        """
        given = [*self._rest[0], *self._rest[1].values()]
        if self._depth > self.last or self._halted or any(isinstance(one, Tensor) for one in given):
            return  # everything has run, or goes on with something that may belong to the tiles
        stay = (~unpaid).nonzero()[:, 0]
        if len(stay) in (0, self.tiles):
            return
        if self._hidden is not None:
            self._hidden = self._hidden[stay]
            self.outputs = {index: value[stay] for index, value in self.outputs.items()}
        self.active = stay

    def run(self, layer: int) -> None:
        """Run the tower up to a layer, and capture what is wanted on the way.

        Args:
            layer: index of the layer. Of the last one that features need only the attention runs, if that will do.
        """
        if self._hidden is None:
            self._embed()
        while self._depth <= layer and self._halted is None:
            index = self._depth
            halting = index == self.end and not self.outputs_read
            stopped = detour(self._attention(index), self._halt) if halting else nullcontext()
            with stopped, probe(self.tower, {index: self.wanted.get(index, set())}) as captured, suppress(_Halt):
                self._hidden = self._forward(index, self._hidden)
                self._depth += 1
                if index in self.features_at:
                    self.outputs[index] = self._hidden
            for key, parts in captured.items():
                self.captured[key] = self._at_all_tiles(torch.cat(parts))

    def everything(self) -> Tensor:
        """Return the outputs of the feature layers side by side, `[tiles, sequence, width]`."""
        self.run(self.last)
        if self._halted is not None and self.last not in self.outputs:
            self.outputs[self.last] = self._forward(self.last, self._hidden)
        return self._at_all_tiles(torch.cat([self.outputs[index] for index in self.features_at], dim=-1))

    def some(self, tile: Tensor, place: Tensor) -> Tensor:
        """Return the outputs of the feature layers for some tokens, `[some, width]`.

        Args:
            tile: the tile of each, in ascending order, `[some]`.
            place: its place in the sequence of the tile, `[some]`.
        """
        self.run(self.last)
        if self.active is not None:
            row = torch.zeros(self.tiles, dtype=torch.long, device=tile.device)
            active = self.active.to(tile.device)
            tile = row.scatter(0, active, torch.arange(len(active), device=tile.device))[tile]
        found = {index: value[tile, place] for index, value in self.outputs.items()}
        if self.last not in found:
            found[self.last] = self._tail(tile, place)
        return torch.cat([found[index] for index in self.features_at], dim=-1)

    def _attention(self, index: int) -> Any:
        return getattr(self.tower.layers[index], self.tower.attention)

    def _embed(self) -> None:
        """Run the tower up to its first layer, and note what its layers are given beside the hidden states."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._hidden, self._rest = args[0], (args[1:], kwargs)
            raise _Halt

        hook = self.tower.layers[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            with suppress(_Halt):
                self.start(self.active)
        finally:
            hook.remove()

    def _forward(self, index: int, hidden: Tensor | None) -> Tensor:
        output = self.tower.layers[index](hidden, *self._rest[0], **self._rest[1])
        return torch.as_tensor(output[0] if isinstance(output, tuple) else output)

    def _halt(
        self, kernel: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        if mask is not None:  # it belongs to all queries of the layer, so the layer runs whole
            return kernel(module, query, key, value, mask, **kwargs)
        self._halted = key, value
        raise _Halt

    def _tail(self, tile: Tensor, place: Tensor) -> Tensor:
        """Run the last layer on some tokens, which attend to all tokens of their tile, `[some, width]`."""
        assert self._hidden is not None
        assert self._halted is not None
        keys, values = self._halted
        counts = torch.zeros(len(keys), dtype=torch.long, device=tile.device).scatter_add(
            0, tile, torch.ones_like(tile)
        )
        slot = torch.arange(len(tile), device=tile.device) - (counts.cumsum(dim=0) - counts)[tile]
        longest = int(counts.max())

        def attend(
            kernel: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
        ) -> tuple[Tensor, None]:
            queries = query.new_zeros(len(keys), longest, *query.shape[1::2])
            queries[tile, slot] = query[0].transpose(0, 1)
            return kernel(module, queries.transpose(1, 2), keys, values, mask, **kwargs)[0][tile, slot][None], None

        with detour(self._attention(self.last), attend):
            return self._forward(self.last, self._hidden[tile, place][None])[0]

    def _at_all_tiles(self, value: Tensor) -> Tensor:
        """Return a tensor of the active tiles with zeros for the others, `[tiles, ...]`."""
        if self.active is None or len(value) == self.tiles:
            return value
        whole = value.new_zeros(self.tiles, *value.shape[1:])
        whole[self.active] = value
        return whole


class Pending:
    """The images of one call, as far as they are encoded. Images refer to it, and it to none: it goes with the last.

    Args:
        adapter: the adapter of the model.
        given: the model inputs of the call.
        layouts: the layouts of the images; all have the same token grid.
        run: the tower.
        align: brings a signal into the space that is shared with the text tower.
    """

    def __init__(
        self,
        adapter: PlaceholderAdapter,
        given: Mapping[str, Any],
        layouts: Sequence[TileGeometry],
        run: TowerRun,
        align: Callable[[Tensor], Tensor],
    ) -> None:
        self.adapter, self.given, self.layouts, self.run, self.align = adapter, given, layouts, run, align
        self.signals: dict[Key, list[Tensor]] = {}

    def images(self, pictures: Sequence[Tensor]) -> list[EncodedImage]:
        """Return what strategies see.

        Args:
            pictures: the first images for drawing.
        """
        found = [(kind, layer) for layer, kinds in self.run.wanted.items() for kind in kinds]
        return [
            LazyImage(
                geometry=layout,
                make=partial(self._features, number),
                at=self.given[self.adapter.pixels].device,
                signals=WhenRead({key: partial(self._signal, key, number) for key in found}),
                layers=len(self.adapter.tower_layers),
                feature_layer=self.run.last,
                newline=self.adapter.newline,
                pixels=pictures[number] if number < len(pictures) else None,
            )
            for number, layout in enumerate(self.layouts)
        ]

    def leave_out(self, paid: Sequence[Tensor | None]) -> None:
        """Encode tiles of which nothing can stay no further than they are.

        Args:
            paid: for each image which of its tiles can keep tokens, base tile first, bool `[tiles]`; None is all.
        """
        if all(one is None for one in paid):
            return
        stay = []
        for one, layout in zip(paid, self.layouts, strict=True):
            tiles = torch.ones(layout.tiles, dtype=torch.bool) if one is None else one.cpu()
            stay.append(tiles if self.adapter.base_first else tiles.roll(-1))
        self.run.leave_out(~torch.cat(stay))

    @cached_property
    def packed(self) -> list[Tensor]:
        """Each image as the model would feed it to the LLM, newlines included, `[length, dim]` each."""
        hidden = self.run.everything()[:, self.run.tower.prefix :]
        flat = self.adapter.visual_tokens(hidden[:, self._patches].flatten(0, 1))
        every = [torch.ones(len(one.packed), dtype=torch.bool, device=flat.device) for one in self.layouts]
        places = in_model_order(self.layouts, every, self.adapter.base_first)
        return [self.adapter.laid_out(flat, one) for one in places]

    def kept(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return what stays of each image; only that goes through the rest of the tower and the projector.

        Args:
            masks: which packed positions stay, bool `[length]` each.
        """
        if "packed" in vars(self):  # made already, for a strategy that reads features
            return taken(self.packed, masks)
        places = in_model_order(self.layouts, masks, self.adapter.base_first)
        total, tokens = sum(one.tiles for one in self.layouts), self.layouts[0].tokens
        stays = torch.zeros(total * tokens + 1, dtype=torch.bool, device=masks[0].device)
        stays[torch.cat(places)] = True  # newlines (-1) mark the entry behind the last token
        found = stays[:-1].nonzero()[:, 0]
        if not len(found):
            return taken(self.packed, masks)
        number = stays[:-1].long().cumsum(dim=0) - 1
        at = self.run.tower.prefix + self._patches.to(found.device)[found % tokens]
        tile = (found // tokens).repeat_interleave(at.shape[1])
        flat = self.adapter.visual_tokens(self.run.some(tile, at.flatten()).unflatten(0, at.shape))
        return [self.adapter.laid_out(flat, torch.where(one == SEPARATOR, one, number[one])) for one in places]

    @cached_property
    def _patches(self) -> Tensor:
        """The patches of each token, row by row, `[tokens, patches]`."""
        (height, width), side = self.layouts[0].token_grid, self.adapter.pooling
        order, sizes = self.adapter.patch_order, {"h": height, "w": width, "p": side, "q": side}
        return rearrange(torch.arange(height * width * side**2), f"{order} -> (h w) (p q)", **sizes)

    def _features(self, number: int) -> Tensor:
        return self.layouts[number].unpack(self.packed[number].detach())

    def _projector_inputs(self) -> Tensor:
        return self.adapter.normed(self.run.everything()[:, self.run.tower.prefix :])

    def _signal(self, key: Key, number: int) -> Tensor:
        kind, layer = key
        if key not in self.signals:
            if kind in ALIGNED_FROM:
                self.signals[key] = [
                    self.align(self._signal((ALIGNED_FROM[kind], layer), one)) for one in range(len(self.layouts))
                ]
            else:
                self.run.run(layer)
                found = self._projector_inputs() if kind == "projector_inputs" else self.run.captured[key]
                self.signals[key] = self.adapter.by_image(kind, [found.detach()], self.layouts, self.given)
        return self.signals[key][number]


class StagedEncoding(Encoding):
    """The images of one call, encoded as far as somebody reads.

    Args:
        pending: their state.
        pictures: the first images for drawing.
    """

    pending: Pending
    staged: ClassVar[bool] = True

    def __init__(self, pending: Pending, pictures: Sequence[Tensor]) -> None:
        known = {"images": pending.images(pictures), "outputs": None, "videos": None, "pending": pending}
        # Frozen, like every encoding.
        vars(self).update(known, inputs=pending.adapter.vision_arguments(pending.given))

    @property
    def packed(self) -> list[Tensor]:
        """Each image as the model would feed it to the LLM, newlines included, `[length, dim]` each."""
        return self.pending.packed

    def leave_out(self, paid: Sequence[Tensor | None]) -> None:
        """Encode tiles of which nothing can stay no further than they are."""
        self.pending.leave_out(paid)

    def kept(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return what stays of each image; only that goes through the rest of the tower and the projector."""
        return self.pending.kept(masks)


def in_model_order(layouts: Sequence[TileGeometry], masks: Sequence[Tensor], base_first: bool) -> list[Tensor]:
    """Return what stands at each place that stays: a flat index over all tiles in the model's order, -1 for a newline.

    Args:
        layouts: the layouts of the images.
        masks: which packed positions stay, bool `[length]` each.
        base_first: whether the tower is given the base tile before the sub-images.
    """
    found, start = [], 0
    for layout, mask in zip(layouts, masks, strict=True):
        places, total = layout.packed.to(mask.device)[mask], layout.tiles * layout.tokens
        moved = places if base_first else (places - layout.tokens) % total
        found.append(torch.where(places == SEPARATOR, places, moved + start))
        start += total
    return found
