"""What a strategy sees: the layout of an image's tiles and the signals of its encoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from tokenprune.layers import LayerChoice, resolve_layers

Key: TypeAlias = tuple[str, int]
"""Kind and layer of a captured signal."""
NEWLINE = -1
"""Marks a learned newline token in `TileGeometry.packed`."""
ROW_SIGNALS = frozenset({"cls_attention", "cls_logits", "joint_attention", "pooling_attention", "received_attention"})
"""Kinds of signals with one number per head and token, `[tiles, heads, tokens]`."""
CLS_SIGNALS = frozenset({"cls_features", "aligned_cls"})
"""Kinds of signals with one vector per tile, `[tiles, 1, width]`."""
ALIGNED_FROM: Mapping[str, str] = {"aligned_features": "vision_features", "aligned_cls": "cls_features"}
"""Kinds of signals in the space that the vision tower shares with its text tower, and what each is made from."""
ALIGNED_SIGNALS = frozenset(ALIGNED_FROM)
"""Kinds of signals in the space that the vision tower shares with its text tower."""
USED_WHEN_ATTACHED = frozenset({"projector_inputs", "resolution"})
"""Kinds that a strategy declares for what is done with its answer: features are mixed, an image is encoded anew."""
TEXT_SIGNALS = frozenset({"question", "question_tokens", "question_positions"})
"""Kinds of signals that come from the prompt instead of the image, `[..., width]`."""


def token_dim(kind: str) -> int:
    """Return along which dimension of a signal tokens stand: behind heads, or behind tiles.

    Args:
        kind: the kind of the signal.
    """
    return 2 if kind in ROW_SIGNALS or kind == "keys" else 1


@dataclass(frozen=True, eq=False)
class TileGeometry:
    """How the tiles of one image are laid out, and in which order the model packs their tokens.

    Tile 0 is the base tile (the downscaled whole image); tiles 1.. are the sub-images in row-major order.

    Args:
        tile_grid: rows x cols of the sub-images; (0, 0) if there is only the base tile.
        token_grid: height x width of the visual tokens of one tile.
        regions: the part of the base tile that each sub-image covers, as (top, left, bottom, right) in fractions of the
            base tile, `[sub_images, 4]`. Sub-images that hold only padding cover nothing.
        packed: what stands at each image position of the prompt, `[length]`: the flat index ``tile * tokens + token``
            of a token, or `NEWLINE` for a learned newline. Tokens that are missing here were removed by the model's
            own unpadding: they are not valid.
    """

    tile_grid: tuple[int, int]
    token_grid: tuple[int, int]
    regions: Tensor
    packed: Tensor

    @property
    def sub_images(self) -> int:
        """Number of sub-images."""
        return self.tile_grid[0] * self.tile_grid[1]

    @property
    def tiles(self) -> int:
        """Number of tiles, the base tile included."""
        return 1 + self.sub_images

    @property
    def tokens(self) -> int:
        """Number of tokens of one tile."""
        return self.token_grid[0] * self.token_grid[1]

    def to(self, device: torch.device | str) -> TileGeometry:
        """Return the same layout with its tensors on a device, for graphs that must not copy."""
        return replace(self, regions=self.regions.to(device), packed=self.packed.to(device))

    @cached_property
    def valid(self) -> Tensor:
        """Which tokens survive the model's own unpadding, bool `[tiles, tokens]`."""
        total = self.tiles * self.tokens
        mask = torch.zeros(total + 1, dtype=torch.bool, device=self.packed.device)
        behind = torch.where(self.packed == NEWLINE, total, self.packed)  # newlines: the entry that is cut off
        mask[behind] = True
        return mask[:total].view(self.tiles, self.tokens)

    @cached_property
    def separators(self) -> int:
        """Number of learned newline tokens."""
        return int((self.packed == NEWLINE).sum())

    @cached_property
    def newline_of(self) -> Tensor:
        """Which separator closes the row of each packed position, `[length]`; -1 where none does.

        A row is the run of tokens since the separator before, of the base tile or of the sub-images. Base tile tokens
        that stand before the first row of the sub-images belong to no row.
        """
        is_newline = self.packed == NEWLINE
        row = torch.cumsum(is_newline, dim=0) - is_newline.long()
        outside = row >= self.separators
        of_base = (self.packed < self.tokens) & ~is_newline
        last = (is_newline.nonzero()[:, 0] - 1).clamp(min=0)
        outside |= ~is_newline & (of_base != of_base[last[row.clamp(max=max(0, len(last) - 1))]] if len(last) else True)
        return row.masked_fill(outside, -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Put packed features back at their tiles, `[tiles, tokens, dim]`; tokens that are not valid are zero.

        Args:
            packed: the image as it enters the LLM, `[length, dim]`.
        """
        places = self.packed.to(packed.device)
        features = packed.new_zeros(self.tiles * self.tokens, packed.shape[-1])
        features[places[places != NEWLINE]] = packed[places != NEWLINE]
        return features.view(self.tiles, self.tokens, -1)

    def resized(self, token_grid: tuple[int, int]) -> tuple[TileGeometry, Tensor]:
        """Return the layout of the same image at a lower resolution.

        Args:
            token_grid: height x width of the tokens of a tile, at most the present ones.

        Returns:
            The new layout, and the tokens of this one that stand at the centers of the new tokens, in the same order,
            bool `[tiles, tokens]`. A new token is valid if its center is.
        """
        if token_grid == self.token_grid:  # a strip so thin that only its newlines are left cannot be told from `valid`
            return self, self.valid
        (rows, cols), (height, width) = self.tile_grid, self.token_grid

        def centers(cells: int, old: int, new: int) -> Tensor:
            return ((2 * torch.arange(cells * new) + 1) * old).div(2 * new, rounding_mode="floor")

        standing = torch.zeros(self.tiles, height, width, dtype=torch.bool)
        standing[0][centers(1, height, token_grid[0])[:, None], centers(1, width, token_grid[1])] = True
        base = torch.arange(math.prod(token_grid))
        if not self.sub_images:
            return replace(self, token_grid=token_grid, packed=base), standing.flatten(1)
        to_canvas = "(rows cols) (height width) -> (rows height) (cols width)"
        sizes = {"rows": rows, "cols": cols}
        valid = rearrange(self.valid[1:].cpu(), to_canvas, height=height, width=width, **sizes)
        numbers = torch.arange(len(base), (1 + self.sub_images) * len(base)).view(self.sub_images, -1)
        numbers = rearrange(numbers, to_canvas, height=token_grid[0], width=token_grid[1], **sizes)
        down, across = centers(rows, height, token_grid[0]), centers(cols, width, token_grid[1])
        stay_down, stay_across = valid.any(dim=1)[down], valid.any(dim=0)[across]
        canvas = torch.zeros_like(valid)
        canvas[down[stay_down][:, None], across[stay_across]] = True
        standing[1:] = rearrange(
            canvas, "(rows height) (cols width) -> (rows cols) height width", height=height, width=width, **sizes
        )
        numbers = numbers[stay_down][:, stay_across]
        if self.separators and numbers.numel():
            numbers = torch.cat([numbers, torch.full((len(numbers), 1), NEWLINE)], dim=1)
        base_first = bool(self.packed[0] < self.tokens)
        parts = [base, numbers.flatten()] if base_first else [numbers.flatten(), base]
        return replace(self, token_grid=token_grid, packed=torch.cat(parts)), standing.flatten(1)

    @classmethod
    def single(cls, token_grid: tuple[int, int]) -> TileGeometry:
        """Return the layout of one tile without separators, as in LLaVA-1.5."""
        return cls((0, 0), token_grid, torch.zeros(0, 4), torch.arange(token_grid[0] * token_grid[1]))

    @classmethod
    def tiled(cls, tile_grid: tuple[int, int], token_grid: tuple[int, int], base_first: bool) -> TileGeometry:
        """Return the layout of an image that is cut evenly, its tiles one after the other and without separators.

        Args:
            tile_grid: rows x cols of the sub-images.
            token_grid: height x width of the tokens of a tile.
            base_first: whether the base tile is packed before the sub-images, or after them.
        """
        (rows, cols), tokens = tile_grid, math.prod(token_grid)
        edges = torch.tensor([[r, c, r + 1, c + 1] for r in range(rows) for c in range(cols)], dtype=torch.float32)
        regions = edges.view(-1, 4) / torch.tensor([rows, cols, rows, cols]).clamp(min=1)
        order = torch.arange((1 + rows * cols) * tokens)
        return cls(tile_grid, token_grid, regions, order if base_first else order.roll(-tokens))

    @classmethod
    def anyres(
        cls, image_size: tuple[int, int], tile_grid: tuple[int, int], token_grid: tuple[int, int], tile_size: int
    ) -> TileGeometry:
        """Return the layout that LLaVA-NeXT's AnyRes gives an image.

        The base tile is the whole image squeezed into a square; the sub-images cut a canvas on which the image is
        scaled to fit and centerd. Rows of the canvas end with a newline token.

        Args:
            image_size: height x width of the image in pixels.
            tile_grid: rows x cols of the sub-images.
            token_grid: height x width of the tokens of a tile.
            tile_size: side of a tile in pixels.
        """
        rows, cols = tile_grid
        canvas = torch.arange(1, 1 + rows * cols).view(rows, cols)
        index = rearrange(
            canvas[..., None, None] * math.prod(token_grid) + torch.arange(math.prod(token_grid)).view(*token_grid),
            "rows cols height width -> (rows height) (cols width)",
        )
        top, left = _unpadding(image_size, (index.shape[0], index.shape[1]))
        index = index[top : index.shape[0] - top, left : index.shape[1] - left]
        newline = torch.full((index.shape[0], 1), NEWLINE)
        packed = torch.cat([torch.arange(math.prod(token_grid)), torch.cat([index, newline], dim=1).flatten()])
        return cls(tile_grid, token_grid, anyres_regions(image_size, tile_grid, tile_size), packed)


def _unpadding(image_size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of tokens that LLaVA-NeXT removes at each side of the canvas.

    The rounding is the one of the original `unpad_image`, kept as it is: token counts depend on it.
    """
    height, width = image_size
    if width / height > canvas[1] / canvas[0]:
        return (canvas[0] - int(round(height * (canvas[1] / width), 7))) // 2, 0
    return 0, (canvas[1] - int(round(width * (canvas[0] / height), 7))) // 2


def anyres_regions(image_size: tuple[int, int], tile_grid: tuple[int, int], tile_size: int) -> Tensor:
    """Return which part of the whole image each sub-image of an AnyRes canvas shows.

    Args:
        image_size: height x width of the image in pixels.
        tile_grid: rows x cols of the sub-images.
        tile_size: side of a tile in pixels.

    Returns:
        (top, left, bottom, right) in fractions of the image, `[sub_images, 4]`.
    """
    canvas = (tile_grid[0] * tile_size, tile_grid[1] * tile_size)
    scale = min(canvas[0] / image_size[0], canvas[1] / image_size[1])
    edges = []
    for cells, side, original in zip(tile_grid, canvas, image_size, strict=True):
        content = min(math.ceil(original * scale), side)  # not rounded first: so the processor resizes
        offset = (side - content) // 2
        edges.append(((torch.arange(cells + 1) * tile_size - offset) / content).clamp(0.0, 1.0))
    rows, cols = edges
    return torch.stack(
        [
            torch.stack([rows[row], cols[col], rows[row + 1], cols[col + 1]])
            for row in range(tile_grid[0])
            for col in range(tile_grid[1])
        ]
    )


def region_coverage(regions: Tensor, token_grid: tuple[int, int]) -> Tensor:
    """Return how much of each base tile token lies inside each region.

    Args:
        regions: (top, left, bottom, right) in fractions of the tile, `[regions, 4]`.
        token_grid: height x width of the tokens of the tile.

    Returns:
        Fractions of a token's area, `[regions, tokens]`.
    """

    def overlap(start: Tensor, stop: Tensor, cells: int) -> Tensor:
        cell = torch.arange(cells, dtype=regions.dtype, device=regions.device)
        inside = torch.minimum(stop[:, None] * cells, cell + 1) - torch.maximum(start[:, None] * cells, cell)
        return inside.clamp(0.0, 1.0)

    top, left, bottom, right = regions.unbind(dim=1)
    rows, cols = overlap(top, bottom, token_grid[0]), overlap(left, right, token_grid[1])
    return rearrange(rows[:, :, None] * cols[:, None, :], "regions height width -> regions (height width)")


class Deferred:
    """A tensor that is computed at the first call and returned again at later ones.

    Args:
        compute: returns the tensor.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        """Return the tensor."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    def __reduce__(self) -> tuple[type[Known], tuple[Tensor]]:
        """Pickle and copy the tensor, not the way to compute it."""
        return Known, (self(),)


class Known(Deferred):
    """A tensor that is computed already.

    Args:
        value: the tensor.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__(lambda: value)
        self._value = value


class MissingSignalError(LookupError):
    """A signal was read that no `needs` declared."""


class Signal(NamedTuple):
    """Something that a strategy reads from the vision tower.

    Args:
        kind: the name of a method of `EncodedImage` that reads it, such as ``"cls_attention"``.
        layer: the layer or layers that it is read from; signals that belong to no layer keep the default.
    """

    kind: str
    layer: LayerChoice = "feature"


@dataclass(init=False, eq=False)
class EncodedImage:
    """One encoded image: geometry, features and the captured signals. Tensors only; easy to build by hand.

    Args:
        geometry: the layout of the tiles.
        features: visual tokens as they would enter the LLM, `[tiles, tokens, dim]`; zeros where a token is not valid.
        signals: captured tensors by (kind, layer index).
        layers: number of layers of the vision tower.
        feature_layer: index of the layer whose output the model uses.
        newline: the learned newline token, `[dim]`; None if the model has none.
        pixels: the tiles as images for drawing, uint8 `[tiles, height, width, 3]`.
        depths: layers and feature layer of the model that a kind of signal was read from, if that is not the vision
            tower.
        compute_features: returns the features; replaces `features` where many strategies do not read them. It is
            called at the first access only.
        device: where the tensors are; that of `features` by default.

    Raises:
        TypeError: if neither `features` nor `compute_features` is passed.
    """

    geometry: TileGeometry
    signals: Mapping[Key, Tensor]
    layers: int
    feature_layer: int
    newline: Tensor | None
    pixels: Tensor | None
    depths: Mapping[str, tuple[int, int]]
    compute_features: Callable[[], Tensor]
    device: torch.device

    def __init__(
        self,
        geometry: TileGeometry,
        features: Tensor | None = None,
        signals: Mapping[Key, Tensor] | None = None,
        layers: int = 1,
        feature_layer: int = 0,
        newline: Tensor | None = None,
        pixels: Tensor | None = None,
        depths: Mapping[str, tuple[int, int]] | None = None,
        compute_features: Callable[[], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if features is None and compute_features is None:
            raise TypeError("an EncodedImage needs features [tiles, tokens, dim] or compute_features; pass one of them")
        self.geometry, self.newline, self.pixels = geometry, newline, pixels
        self.signals, self.depths = signals or {}, depths or {}
        self.layers, self.feature_layer = layers, feature_layer
        if features is not None:
            self.compute_features, self.device = Known(features), features.device
        elif compute_features is not None:
            is_deferred = isinstance(compute_features, Deferred)  # shared by copies of `dataclasses.replace`
            self.compute_features = compute_features if is_deferred else Deferred(compute_features)
            self.device = self.features.device if device is None else torch.device(device)

    @property
    def features(self) -> Tensor:
        """Visual tokens as they would enter the LLM, `[tiles, tokens, dim]`."""
        return self.compute_features()

    def with_features(self, features: Tensor) -> EncodedImage:
        """Return the same image with other features.

        Args:
            features: visual tokens, `[tiles, tokens, dim]`.
        """
        return replace(self, compute_features=Known(features), device=features.device)

    def with_signals(
        self, signals: Mapping[Key, Tensor], depths: Mapping[str, tuple[int, int]] | None = None
    ) -> EncodedImage:
        """Return the same image with more signals.

        Args:
            signals: tensors by (kind, layer index).
            depths: layers and feature layer of the model that a kind comes from, if that is not the vision tower.
        """
        return replace(self, signals={**self.signals, **signals}, depths={**self.depths, **(depths or {})})

    def in_packed_order(self) -> EncodedImage:
        """Return the valid tokens of all tiles as one tile of a single row, in the order in which the model packs them.

        Strategies that treat an image as one sequence read it like this.
        """
        places = self.geometry.packed[self.geometry.packed != NEWLINE].to(self.device)

        def pool(kind: str, value: Tensor) -> Tensor:
            if kind in ROW_SIGNALS:
                flat = rearrange(value, "tiles heads tokens -> heads (tiles tokens)")[None]
                return flat[..., places.to(flat.device)]
            if kind == "keys":
                flat = rearrange(value, "tiles heads tokens dim -> heads (tiles tokens) dim")[None]
                return flat[:, :, places.to(flat.device)]
            if kind in TEXT_SIGNALS:
                return value
            if kind in CLS_SIGNALS:
                return value[:1]
            return rearrange(value, "tiles tokens dim -> (tiles tokens) dim")[None, places.to(value.device)]

        return replace(
            self,
            geometry=TileGeometry.single((1, len(places))),
            signals={key: pool(key[0], value) for key, value in self.signals.items()},
            pixels=None,
            compute_features=Deferred(lambda: pool("features", self.features)),
        )

    def read(self, signal: Signal) -> Tensor:
        """Return a captured signal, averaged over its layers in float32.

        Raises:
            MissingSignalError: if the signal was not captured because no `needs` declared it.
        """
        found = []
        depth = self.depths.get(signal.kind, (self.layers, self.feature_layer))
        for layer in resolve_layers(signal.layer, *depth):
            if (signal.kind, layer) not in self.signals:
                have = ", ".join(f"{kind} of layer {index}" for kind, index in sorted(self.signals)) or "none"
                raise MissingSignalError(
                    f"{signal.kind} of layer {layer} was not captured (captured: {have}); "
                    f"declare Signal({signal.kind!r}, {signal.layer!r}) in the strategy's `needs`"
                )
            found.append(self.signals[signal.kind, layer].float())
        return found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)

    def cls_attention(self, layer: LayerChoice) -> Tensor:
        """Return the attention that CLS pays to each token, `[tiles, heads, tokens]`.

        Rows are softmaxed over all keys and the CLS key is removed, so that they sum to less than 1.

        Args:
            layer: the layer to read, or several to average.
        """
        return self.read(Signal("cls_attention", layer))

    def cls_logits(self, layer: LayerChoice) -> Tensor:
        """Return what CLS attention is before the softmax, `[tiles, heads, tokens]`."""
        return self.read(Signal("cls_logits", layer))

    def received_attention(self, layer: LayerChoice) -> Tensor:
        """Return the attention each token receives, averaged over all queries, `[tiles, heads, tokens]`."""
        return self.read(Signal("received_attention", layer))

    def pooling_attention(self, layer: LayerChoice = "feature") -> Tensor:
        """Return the attention that the probe of a pooling head pays to each token, `[tiles, heads, tokens]`.

        The head stands behind the last layer, so that every layer answers the same. Rows sum to 1.

        Args:
            layer: any layer that was declared.
        """
        return self.read(Signal("pooling_attention", layer))

    def keys(self, layer: LayerChoice) -> Tensor:
        """Return the attention keys of a layer, `[tiles, heads, tokens, head_dim]`."""
        return self.read(Signal("keys", layer))

    def joint_attention(self, layer: LayerChoice) -> Tensor:
        """Return CLS attention with all heads taken as one wide head, `[tiles, 1, tokens]`."""
        return self.read(Signal("joint_attention", layer))

    def vision_features(self, layer: LayerChoice) -> Tensor:
        """Return the output of a layer of the vision tower, before the projector, `[tiles, tokens, width]`."""
        return self.read(Signal("vision_features", layer))

    def projector_inputs(self) -> Tensor:
        """Return what the projector is given, `[tiles, tokens, width]`."""
        return self.read(Signal("projector_inputs"))

    def cls_features(self, layer: LayerChoice) -> Tensor:
        """Return the CLS token that a layer of the vision tower puts out, `[tiles, 1, width]`."""
        return self.read(Signal("cls_features", layer))

    def aligned_features(self, layer: LayerChoice) -> Tensor:
        """Return tokens in the space that the vision tower shares with its text tower, `[tiles, tokens, shared]`.

        They are not normalized: ``visual_projection(post_layernorm(x))`` of CLIP.
        """
        return self.read(Signal("aligned_features", layer))

    def aligned_cls(self, layer: LayerChoice) -> Tensor:
        """Return each tile's CLS token in the space shared with the text tower, not normalized, `[tiles, 1, shared]`.

        Of the last layer, it is what CLIP calls the embedding of an image.
        """
        return self.read(Signal("aligned_cls", layer))

    def question(self) -> Tensor:
        """Return the question in the shared space, one vector per segment of a long text, `[segments, shared]`."""
        return self.read(Signal("question"))

    def question_tokens(self) -> Tensor:
        """Return each text token of the question in the shared space, `[text_tokens, shared]`."""
        return self.read(Signal("question_tokens"))

    def question_positions(self) -> Tensor:
        """Return every position of the text tower's input in the shared space, `[segments, positions, shared]`.

        Begin, end and the padding up to the tower's length are among them; `question_tokens` has the words alone.
        """
        return self.read(Signal("question_positions"))
