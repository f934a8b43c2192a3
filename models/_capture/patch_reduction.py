"""The steps of strategies before and inside a vision tower, and the patches that remain while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.encoder.patches import PatchGroups, RemainingPatches
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.geometry import TileGeometry
from tokenprune.image import ROW_SIGNALS, EncodedImage, SignalKey, token_dim
from tokenprune.models._capture.hooks import ATTENTION, Tower
from tokenprune.saliency import with_cls_substitute


class PatchReduction:
    """The steps of strategies inside one tower, and the patches that remain while it runs.

    Args:
        reducers: the strategies, in the order of their stages.
        mlp: name of the MLP in a layer of the tower.
        layers: number of layers that run.
        attention: the kind of signal that replaces CLS attention.
        entering: positions in the sequence of the patches of each image that enter the first layer, `[kept]` each; None
            if all patches enter. Only for towers that run over all images as one sequence.
    """

    def __init__(
        self,
        reducers: Sequence[EncoderReducer],
        mlp: str,
        layers: int,
        attention: str,
        entering: Sequence[Tensor] | None = None,
    ) -> None:
        self.reducers, self.mlp, self.layers, self.attention = tuple(reducers), mlp, layers, attention
        self.entering = entering
        self.previous: Tensor | None = None
        """Hidden states that entered the last layer that ran, `[tiles, length, width]`; None before a pass."""
        self.attending: RemainingPatches | None = None
        """Patches on which attention runs before `attending_end`, also dropped ones; None without such layers."""
        self.attending_end = 0
        """The first layer whose attention runs on the remaining patches only."""
        self.remaining: RemainingPatches | None = None
        """The patches that remain in the pass in progress; None before the first layer with a step."""
        self.passes: list[RemainingPatches] = []
        """The patches that remained at the end of each pass through the tower."""
        self.lengths: list[int] = []
        """Number of remaining patches of each segment of the sequence; one segment if the first dimension is tiles."""
        self.inputs: dict[int, list[RemainingPatches]] = {}
        """The patches on which the attention of each layer ran, one entry per pass."""
        self.counts: list[tuple[int, int]] = []
        """Patches of each layer that ran, summed over tiles: without reduction, and in the MLP of the layer."""
        self._steps: dict[int, list[tuple[EncoderReducer, list[int]]]] = {}

    @property
    def first(self) -> int:
        """Index of the first layer with a step, or of the layer before it that the step reads.

        A new pass through the tower begins there.
        """
        if self.entering is not None:
            return 0
        return min(
            min(reducer.list_steps(2, self.layers), default=self.layers) - int(reducer.reads_change)
            for reducer in self.reducers
        )

    @property
    def is_proportional(self) -> bool:
        """Whether a strategy requires that attention counts merged patches as often as their patches."""
        return any(reducer.proportional_attention for reducer in self.reducers)

    @property
    def restores(self) -> bool:
        """Whether the tower has restored all dropped patches in every pass."""
        return all(state.dropped is not None for state in self.passes)

    @property
    def key_bias(self) -> Tensor | None:
        """The bias on the keys of merged patches in the layer that runs, `[tiles, length]`; None without a bias."""
        return self.remaining.key_bias if self.is_proportional and self.remaining is not None else None

    def start_pass(self, tower: Tower, hidden: Tensor) -> None:
        """Read the steps of a pass through the tower.

        Args:
            tower: the tower.
            hidden: hidden states that enter the first layer with a step, `[tiles, length, width]`.
        """
        patches = hidden.shape[1] - int(tower.cls != "none")
        self.lengths = [patches] if tower.segments is None else list(tower.segments)
        self.remaining = RemainingPatches.all(len(hidden), patches, tower.cls, hidden.device)
        if self.entering is not None:
            self.lengths = [len(index) for index in self.entering]
            self.remaining = self.remaining.narrow(PatchGroups(torch.cat(list(self.entering))[None]))
        self._steps, self.previous, self.attending = {}, None, None
        for reducer in self.reducers:
            numbers = [reducer.list_steps(length, self.layers) for length in self.lengths]
            for layer in numbers[0]:
                self._steps.setdefault(layer, []).append((reducer, [steps[layer] for steps in numbers]))

    def list_steps(self, layer: int, acts: str) -> list[tuple[EncoderReducer, list[int]]]:
        """Return the steps of a layer that reduce patches: the strategy, and the patches of each segment after it.

        Args:
            layer: index of the layer.
            acts: ``"inside"`` or ``"before"`` the layer.
        """
        steps = [step for step in self._steps.get(layer, ()) if step[0].acts == acts]
        return [(reducer, numbers) for reducer, numbers in steps if numbers != self.lengths]

    def reduce(
        self,
        layer: int,
        depth: int,
        step: tuple[EncoderReducer, list[int]],
        sequence: Tensor,
        signals: Mapping[str, Tensor],
        real: Tensor | None,
    ) -> tuple[RemainingPatches, Tensor]:
        """Reduce the patches that remain; returns them and their sequence, `[tiles, remaining, width]`.

        Args:
            layer: index of the layer.
            depth: number of layers of the tower.
            step: the strategy, and the number of patches of each segment after the step.
            sequence: hidden states of the remaining entries, `[tiles, length, width]`.
            signals: signals of the layer by kind, over the remaining patches of all segments.
            real: entries that are not padding, bool `[tiles, length]`; None means all entries.
        """
        if self.remaining is None:
            raise RuntimeError("a step inside the tower runs before its pass has started")
        reducer, numbers = step
        cls_token, patches = self.remaining.split_cls(sequence)
        if reducer.reads_change and self.previous is not None:
            change = patches - self.remaining.split_cls(self.remaining.gather(self.previous))[1]
            signals = {**signals, "state_change": change}
        is_real = None if real is None else self.remaining.split_cls(real[..., None])[1][..., 0]
        parts: list[PatchGroups] = []
        for number, (start, length) in zip(numbers, list_segments(self.lengths), strict=True):
            captured: dict[SignalKey, Tensor] = {
                (kind, layer): value.narrow(token_dim(kind), start, length) for kind, value in signals.items()
            }
            features = patches[:, start : start + length]
            captured["vision_features", layer] = features
            if cls_token.shape[1]:
                captured["cls_features", layer] = cls_token
            geometry = find_geometry(len(features), length)
            if is_real is not None:
                geometry = geometry.restrict(is_real[:, start : start + length].flatten().cpu())
            image = EncodedImage(geometry, features, captured, layers=depth, feature_layer=layer)
            image = with_cls_substitute(image, reducer.needs, self.attention)
            parts.append(reducer.group_checked(image, min(number, length)))
        groups = parts[0] if len(parts) == 1 else join_groups(parts, self.lengths)
        self.lengths = [part.kept.shape[1] for part in parts]
        if reducer.full_attention_layers:
            self.attending, self.attending_end = self.remaining, layer + reducer.full_attention_layers
        self.remaining, sequence = self.remaining.apply(groups, sequence)
        return self.remaining, sequence

    def find_attending(self, layer: int, remaining: RemainingPatches) -> RemainingPatches:
        """Return the patches on which the attention of a layer runs.

        Args:
            layer: index of the layer.
            remaining: the patches that remain.
        """
        return remaining if self.attending is None or layer >= self.attending_end else self.attending

    def expand_captured(
        self, tower: Tower, captured: Mapping[SignalKey, list[Tensor]]
    ) -> dict[SignalKey, list[Tensor]]:
        """Return captured tensors over all patches, after the tower has run.

        Rows of attention and of logits are zero at patches without an entry. All patches of a group share their key.

        Args:
            tower: the tower.
            captured: the captured tensors by kind and layer index.
        """
        expanded: dict[SignalKey, list[Tensor]] = {}
        for (kind, layer), values in captured.items():
            source = tower.rows_from.get(layer, layer) if kind in ROW_SIGNALS else layer
            states, dim = self.inputs.get(source), token_dim(kind)
            if kind not in ATTENTION or states is None:
                expanded[kind, layer] = values
                continue
            parts = values if tower.segments is None else [torch.cat(values, dim)]
            expanded[kind, layer] = [
                state.expand_rows(value, dim) if kind in ROW_SIGNALS else state.expand_groups(value, dim)
                for state, value in zip(states, parts, strict=True)
            ]
        return expanded

    def read_mask(self) -> list[Tensor]:
        """Return the mask of the patches with a state after the tower has run, bool `[tiles, patches]` per pass."""
        return [state.restored_mask for state in self.passes]


@lru_cache(maxsize=256)
def find_geometry(tiles: int, patches: int) -> TileGeometry:
    """Return the layout of tiles of equally many patches side by side, each a single row.

    Args:
        tiles: number of tiles.
        patches: number of patches of a tile.
    """
    with torch.inference_mode(False):  # a later call may record gradients
        grid = (1, tiles - 1) if tiles > 1 else (0, 0)
        return TileGeometry(grid, (1, patches), torch.zeros(tiles - 1, 4), torch.arange(tiles * patches))


def list_segments(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the start and the length of consecutive segments.

    Args:
        lengths: the length of each segment.
    """
    return [(sum(lengths[:number]), length) for number, length in enumerate(lengths)]


def join_groups(parts: Sequence[PatchGroups], lengths: Sequence[int]) -> PatchGroups:
    """Return the groups of several segments as groups of one sequence; nothing is merged.

    Segments with fewer neighbors than others get -1 as further neighbors.

    Args:
        parts: the groups of each segment.
        lengths: the length of each segment.
    """
    starts = [start for start, _ in list_segments(lengths)]
    kept = torch.cat([part.kept + start for part, start in zip(parts, starts, strict=True)], dim=1)
    numbers = [start for start, _ in list_segments([part.kept.shape[1] for part in parts])]
    pairs = zip(parts, numbers, strict=True)
    neighbors = [part.neighbors + number for part, number in pairs if part.neighbors is not None]
    if not neighbors:
        return PatchGroups(kept)
    width = max(part.shape[2] for part in neighbors)
    padded = [F.pad(part, (0, width - part.shape[2]), value=-1) for part in neighbors]
    return PatchGroups(kept, neighbors=torch.cat(padded, dim=1))
