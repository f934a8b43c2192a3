"""Encodes images only as far as somebody reads: what dropped tokens would have cost is not spent.

The tower's layers run one by one, up to the one that a strategy reads. Of the last needed layer only the attention rows
are made; its output projection and its MLP wait until it is known which tokens stay, and run on these alone, as does
the projector. Tiles of which nothing can stay go no further than the layer that said so; where the base tile alone says
so, it runs ahead, and they do not begin. Layers behind the last needed one, and the pooling head, do not run.

Every layer runs its own `forward` with the user's kernel. Dropped tokens still are keys and values of the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
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


@dataclass
class Reached:
    """How far some tiles are encoded.

    Args:
        tiles: which ones, in ascending order, `[active]`; None is all.
        depth: layers that have run.
        hidden: what the last of them put out, `[active, sequence, width]`; None before the first.
        rest: what every layer is given beside it.
        outputs: the outputs of feature layers by layer index.
        halted: keys and values of the layer at `depth`, if it stopped behind its attention.
    """

    tiles: Tensor | None = None
    depth: int = 0
    hidden: Tensor | None = None
    rest: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    outputs: dict[int, Tensor] = field(default_factory=dict)
    halted: tuple[Tensor, ...] | None = None

    @property
    def bound(self) -> bool:
        """Whether layers are given something beside the hidden states that may belong to these very tiles."""
        return any(isinstance(one, Tensor) for one in [*self.rest[0], *self.rest[1].values()])

    def part(self, rows: Tensor, tiles: Tensor) -> Reached:
        """Return some of the tiles alone.

        Args:
            rows: which rows of all tensors, `[some]`.
            tiles: what tiles these are, `[some]`.
        """
        assert self.hidden is not None
        outputs = {index: value[rows] for index, value in self.outputs.items()}
        halted = None if self.halted is None else tuple(one[rows] for one in self.halted)
        return replace(self, tiles=tiles, hidden=self.hidden[rows], outputs=outputs, halted=halted)

    def beside(self, other: Reached) -> Reached:
        """Return these tiles and other ones that are as far, not yet in order."""
        assert self.hidden is not None
        assert other.hidden is not None
        halted = None
        if self.halted is not None and other.halted is not None:
            halted = tuple(map(torch.cat, zip(self.halted, other.halted, strict=True)))
        return replace(
            self,
            hidden=torch.cat([self.hidden, other.hidden]),
            outputs={i: torch.cat([one, other.outputs[i]]) for i, one in self.outputs.items() if i in other.outputs},
            halted=halted,
        )


class TowerRun:
    """A vision tower under way.

    Args:
        tower: where signals are found in it.
        start: runs the tower's own `forward` on some tiles, given their places among all.
        tiles: number of tiles.
        wanted: kinds of signals per layer index.
        features_at: the layers whose outputs become features.
        of_all: those of the wanted signals that are read of all tiles; the others are captured of tiles that run ahead
            alone, if some do.
    """

    def __init__(
        self,
        tower: Tower,
        start: Callable[[Tensor | None], Any],
        tiles: int,
        wanted: Mapping[int, set[str]],
        features_at: Sequence[int],
        of_all: Mapping[int, set[str]],
    ) -> None:
        self.tower, self.start, self.tiles, self.wanted, self.of_all = tower, start, tiles, wanted, of_all
        self.features_at = features_at
        self.last = max(features_at)
        """The last layer that features need."""
        self.end = max([self.last, *wanted])
        """The last layer that anything needs."""
        self.outputs_read = bool(wanted.get(self.end, set()) & WHOLE)
        """Whether its output is a signal; else only attention is read there."""
        self.captured: dict[Key, Tensor] = {}
        self.at = Reached()
        """The tiles that are still encoded, and how far they are."""
        self.ahead = False
        """Whether these run ahead, and others may follow."""

    def begin_with(self, tiles: Tensor) -> None:
        """Encode some tiles only, until `leave_out` says which others follow; signals of those are zero until then.

        Args:
            tiles: the tiles that run ahead, in ascending order, `[ahead]`.
        """
        if self.at.hidden is None and len(tiles) < self.tiles:
            self.at, self.ahead = Reached(tiles), True

    def leave_out(self, unpaid: Tensor) -> None:
        """Encode some tiles no further; their signals of deeper layers are zero, and all of them if they did not begin.

        Args:
            unpaid: the tiles, bool `[tiles]`; if that is all of them, nothing is left out.
        """
        ahead, self.ahead = self.ahead, False
        stay = torch.arange(self.tiles) if bool(unpaid.all()) else (~unpaid).nonzero()[:, 0]
        if self.at.hidden is None or (ahead and self.at.bound):
            self.at = Reached(stay if len(stay) < self.tiles else None)
        elif ahead:
            self._let_follow(stay)
        elif len(stay) < self.tiles and not (self.at.depth > self.last or self.at.halted or self.at.bound):
            self.at = self.at.part(stay, stay)

    def _let_follow(self, stay: Tensor) -> None:
        """Bring tiles to where those are that ran ahead.

        Args:
            stay: all tiles that are encoded from now on, `[active]`.
        """
        first, before = self.at, self.captured
        assert first.tiles is not None
        rows = torch.isin(first.tiles, stay).nonzero()[:, 0]
        both = first.part(rows, first.tiles[rows])
        following = stay[~torch.isin(stay, first.tiles)]
        if len(following):
            self.at, self.captured = Reached(following), {}
            self.run(first.depth - (first.halted is None), self.of_all)
            # Each has zeros where the other has tiles.
            self.captured = {key: value + self.captured.get(key, 0) for key, value in before.items()}
            both = both.beside(self.at)
        order = torch.cat([first.tiles[rows], following]).argsort()
        self.at = both.part(order, stay)
        self.at.tiles = stay if len(stay) < self.tiles else None

    def run(self, layer: int, wanted: Mapping[int, set[str]] | None = None) -> None:
        """Run the tower up to a layer, and capture what is wanted on the way.

        Args:
            layer: index of the layer. Of the last one that features need only the attention runs, if that will do.
            wanted: kinds of signals to capture by layer index; all that are wanted if left out.
        """
        wanted = self.wanted if wanted is None else wanted
        if self.at.hidden is None:
            self._embed()
        while self.at.depth <= layer and self.at.halted is None:
            index = self.at.depth
            halting = index == self.end and not self.outputs_read
            stopped = detour(self._attention(index), self._halt) if halting else nullcontext()
            with stopped, probe(self.tower, {index: wanted.get(index, set())}) as captured, suppress(_Halt):
                self.at.hidden = self._forward(index, self.at.hidden)
                self.at.depth += 1
                if index in self.features_at:
                    self.at.outputs[index] = self.at.hidden
            for key, parts in captured.items():
                self.captured[key] = self._at_all_tiles(torch.cat(parts))

    def everything(self) -> Tensor:
        """Return the outputs of the feature layers side by side, `[tiles, sequence, width]`."""
        self.run(self.last)
        if self.at.halted is not None and self.last not in self.at.outputs:
            self.at.outputs[self.last] = self._forward(self.last, self.at.hidden)
        return self._at_all_tiles(torch.cat([self.at.outputs[index] for index in self.features_at], dim=-1))

    def some(self, tile: Tensor, place: Tensor) -> Tensor:
        """Return the outputs of the feature layers for some tokens, `[some, width]`.

        Args:
            tile: the tile of each, in ascending order, `[some]`.
            place: its place in the sequence of the tile, `[some]`.
        """
        self.run(self.last)
        if self.at.tiles is not None:
            row = torch.zeros(self.tiles, dtype=torch.long, device=tile.device)
            active = self.at.tiles.to(tile.device)
            tile = row.scatter(0, active, torch.arange(len(active), device=tile.device))[tile]
        found = {index: value[tile, place] for index, value in self.at.outputs.items()}
        if self.last not in found:
            found[self.last] = self._tail(tile, place)
        return torch.cat([found[index] for index in self.features_at], dim=-1)

    def _attention(self, index: int) -> Any:
        return getattr(self.tower.layers[index], self.tower.attention)

    def _embed(self) -> None:
        """Run the tower up to its first layer, and note what its layers are given beside the hidden states."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.at.hidden, self.at.rest = args[0], (args[1:], kwargs)
            raise _Halt

        hook = self.tower.layers[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            with suppress(_Halt):
                self.start(self.at.tiles)
        finally:
            hook.remove()

    def _forward(self, index: int, hidden: Tensor | None) -> Tensor:
        output = self.tower.layers[index](hidden, *self.at.rest[0], **self.at.rest[1])
        return torch.as_tensor(output[0] if isinstance(output, tuple) else output)

    def _halt(
        self, kernel: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        if mask is not None:  # it belongs to all queries of the layer, so the layer runs whole
            return kernel(module, query, key, value, mask, **kwargs)
        self.at.halted = key, value
        raise _Halt

    def _tail(self, tile: Tensor, place: Tensor) -> Tensor:
        """Run the last layer on some tokens, which attend to all tokens of their tile, `[some, width]`."""
        assert self.at.hidden is not None
        assert self.at.halted is not None
        keys, values = self.at.halted
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
            return self._forward(self.last, self.at.hidden[tile, place][None])[0]

    def _at_all_tiles(self, value: Tensor) -> Tensor:
        """Return a tensor of the active tiles with zeros for the others, `[tiles, ...]`."""
        if self.at.tiles is None or len(value) == self.tiles:
            return value
        whole = value.new_zeros(self.tiles, *value.shape[1:])
        whole[self.at.tiles] = value
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

    def images(self, pictures: Sequence[Tensor] = (), features: bool = True) -> list[EncodedImage]:
        """Return what strategies see.

        Args:
            pictures: the first images for drawing.
            features: whether features can be made.
        """
        found = [(kind, layer) for layer, kinds in self.run.wanted.items() for kind in kinds]
        return [
            LazyImage(
                geometry=layout,
                make=partial(self._features if features else self._no_features, number),
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
        if self.run.ahead:
            self.signals.clear()  # they are of base tiles alone
        elif all(one is None for one in paid):
            return
        stay = []
        for one, layout in zip(paid, self.layouts, strict=True):
            tiles = torch.ones(layout.tiles, dtype=torch.bool) if one is None else one.cpu()
            stay.append(tiles if self.adapter.base_first else tiles.roll(-1))
        self.run.leave_out(~torch.cat(stay))

    def base_tiles(self) -> list[EncodedImage]:
        """Return the images with signals of their base tiles alone, until `leave_out`."""
        ends = torch.tensor([one.tiles for one in self.layouts]).cumsum(dim=0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        self.run.begin_with(starts if self.adapter.base_first else ends - 1)
        return self.images(features=False)

    @cached_property
    def packed(self) -> list[Tensor]:
        """Each image as the model would feed it to the LLM, newlines included, `[length, dim]` each."""
        hidden = self.run.everything()[:, self.run.tower.prefix :]
        flat = self.adapter.all_visual_tokens(hidden, self._patches)
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

    def _no_features(self, number: int) -> Tensor:
        raise ValueError(
            f"features of image {number} were read to say which tiles are paid for, but only base tiles are encoded "
            "then; declare its signals for all tiles"
        )

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

    def base_tiles(self) -> list[EncodedImage]:
        """Return the images with signals of their base tiles alone, which are encoded first; `leave_out` comes next."""
        return self.pending.base_tiles()

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
