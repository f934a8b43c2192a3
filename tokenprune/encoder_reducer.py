"""Base classes of strategies that drop or merge patches inside the vision tower."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.budget import MAX_DENOMINATOR, Budget, UnreachableBudgetWarning, format_budget, parse_amount
from tokenprune.checks import raise_if
from tokenprune.decoder_reducer import scale_schedule
from tokenprune.encoder.matching import match_bipartite
from tokenprune.encoder.patches import PatchGroups
from tokenprune.image import APPLICATION_SIGNALS, LLM_SIGNALS, TEXT_SIGNALS, EncodedImage
from tokenprune.reducer import TokenReducer
from tokenprune.saliency import SaliencyModel
from tokenprune.selection import Selection
from tokenprune.stages import EncoderStage, Stage


@dataclass
class EncoderReducer(TokenReducer, ABC):
    """A strategy that drops or merges patches inside the vision tower: later layers run on the patches that remain.

    Every tile is reduced on its own, to an equal number of patches. `group` receives the tiles of a call at one layer:
    `features` are the hidden states `[tiles, patches, width]`, and signals of this layer are declared in `needs` with
    the layer choice ``"feature"``. If a visual token is one patch, it enters the LLM only if its patch remains; a
    merged patch has the position of one of its members. In other models all tokens enter the LLM, and only the tower
    becomes faster.

    Args:
        budget: patches of a tile that remain after the last step of the schedule: a ratio, or a count. A ratio scales
            the ratios of earlier steps (see `scale_schedule`). By default the schedule is taken as it is.
        schedule: (layer, patches of a tile that remain) of each step in ascending order. A layer is an index, or a
            relative depth from 0.0 to 1.0 of the layers that run.
    """

    stage: ClassVar[Stage] = EncoderStage()
    exact: ClassVar[bool] = False
    acts: ClassVar[Literal["inside", "before"]] = "inside"
    """Where a step acts: ``"inside"`` a layer, between its attention and its MLP, or ``"before"`` the layer."""

    budget: int | float | str | Budget | None = None  # type: ignore[assignment]
    schedule: tuple[tuple[int | float, int | float], ...] = field(default=((0.25, 0.5),), kw_only=True)

    def __post_init__(self) -> None:
        """Read the schedule; without a budget, the budget is the amount of the last step.

        Raises:
            ValueError: if the schedule is empty, or a later step keeps more patches than an earlier step.
        """
        self.schedule = tuple((layer, parse_amount(amount)) for layer, amount in self.schedule)
        amounts = [amount for _, amount in self.schedule]
        for earlier, later in pairwise(amounts):
            if type(earlier) is type(later) and earlier < later:
                raise ValueError(
                    f"a later step keeps at most the patches of an earlier step, but {later} follows {earlier}"
                )
        for layer, _ in self.schedule:
            is_depth = isinstance(layer, float) and 0 <= layer <= 1
            is_index = isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0
            if not (is_depth or is_index):
                raise ValueError(
                    f"layer {layer!r} of the schedule is neither an index from 0 nor a relative depth from 0.0 to 1.0"
                )
        if isinstance(self.budget, Budget):
            raise ValueError(
                f"budget={self.budget!r} refers to the tokens of an image, and a strategy inside the vision tower "
                "reduces the patches of each tile; write a ratio such as 0.5, or a number of patches"
            )
        self.budget = self._default_budget(amounts) if self.budget is None else parse_amount(self.budget)
        if isinstance(self.attention, SaliencyModel):
            raise ValueError(
                f"{type(self).__name__} reads the tower while it runs, so that a saliency model cannot replace its "
                'attention; set attention="auto"'
            )
        super().__post_init__()
        self._check_needs()

    def _default_budget(self, amounts: Sequence[int | float]) -> int | float:
        """Return the budget if none is set: the amount of the last step.

        Raises:
            ValueError: if the schedule has no step.
        """
        if not amounts:
            raise ValueError("a schedule needs at least one step (layer, patches), such as ((0.25, 0.5),)")
        return amounts[-1]

    def _check_needs(self) -> None:
        """Check that the needed signals exist while the tower runs.

        Raises:
            ValueError: if a signal comes from the question, the LLM or the projector, or names another layer.
        """
        for kind, layer in self.needs:
            if kind in TEXT_SIGNALS | LLM_SIGNALS | APPLICATION_SIGNALS or layer != "feature":
                raise ValueError(
                    f"{type(self).__name__} needs {kind} of layer {layer!r}, but inside the vision tower a strategy "
                    'reads signals of the layer of the step only, such as Signal("cls_attention", "feature")'
                )

    @property
    def merges(self) -> bool:
        """Whether `group` merges patches; towers that run over all images as one sequence do not support it."""
        return False

    @property
    def proportional_attention(self) -> bool:
        """Whether attention counts a merged patch as often as the patches that it represents."""
        return False

    @property
    def full_attention_layers(self) -> int:
        """Number of layers from a step on whose attention runs on dropped patches, too; they must be restored."""
        return 0

    @property
    def reads_change(self) -> bool:
        """Whether `group` reads the change of the patches in the layer before the step."""
        return any(kind == "state_change" for kind, _ in self.needs)

    @property
    def budget_label(self) -> str:
        """The patches that remain, with the layer of the last step: ``"34% of the patches"``."""
        budget = format_budget(self.budget)
        return f"{budget} of the patches" if budget.endswith("%") else budget.replace("tokens", "patches")

    def list_steps(self, patches: int, layers: int) -> Mapping[int, int]:
        """Return the number of patches of a tile that remain after each step, by layer.

        Args:
            patches: number of patches of a tile.
            layers: number of layers that run.

        Raises:
            ValueError: if a step lies after the last layer that runs, or has no layer before it that it reads.
        """
        amounts = scale_schedule([amount for _, amount in self.schedule], parse_amount(self.budget))
        steps: dict[int, int] = {}
        for (layer, _), amount in zip(self.schedule, amounts, strict=True):
            index = max(round(layer * (layers - 1)), int(self.reads_change)) if isinstance(layer, float) else int(layer)
            if index < int(self.reads_change):
                raise ValueError(
                    f"{type(self).__name__} reads the layer before a step, and layer {index} of the schedule is the "
                    "first layer; use layers from 1 on"
                )
            if index >= layers:
                raise ValueError(
                    f"layer {index} of the schedule does not run: the model uses the output of layer {layers - 1} of "
                    f"its vision tower; use layers from 0 to {layers - 1}, or relative depths"
                )
            steps[index] = min(count_patches(amount, patches), *steps.values(), patches)
        return steps

    def keeps_all(self, patches: int, layers: int) -> bool:
        """Return whether no step drops or merges a patch.

        Args:
            patches: number of patches of a tile.
            layers: number of layers that run.
        """
        return all(number >= patches for number in self.list_steps(patches, layers).values())

    @abstractmethod
    def group(self, image: EncodedImage, number: int) -> PatchGroups:
        """Return the patches of each tile that remain after a step. Every tile is reduced on its own.

        Args:
            image: the tiles of a call at the layer of the step, without the patches that are no longer there.
            number: number of patches of a tile that remain.
        """

    def group_checked(self, image: EncodedImage, number: int) -> PatchGroups:
        """Return the result of `group` after a check of its shapes.

        Args:
            image: the tiles of a call at the layer of the step.
            number: number of patches of a tile that remain.

        Raises:
            TypeError: if `group` returned no `PatchGroups`.
            ValueError: if its tensors have other shapes.
        """
        groups, name = self.group(image, number), type(self).__name__
        if not isinstance(groups, PatchGroups):
            raise TypeError(f"{name}.group must return PatchGroups, not {type(groups).__name__}")
        tiles, patches = image.geometry.tiles, image.geometry.tokens
        shapes = {"kept": (tiles, number), "group": (tiles, patches), "weights": (tiles, patches)}
        for field_name, shape in shapes.items():
            value = getattr(groups, field_name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"{name}.group must return {field_name} of shape {list(shape)}, not {list(value.shape)}"
                )
        neighbors = groups.neighbors
        if neighbors is not None and tuple(neighbors.shape[:2]) != (tiles, patches - number):
            raise ValueError(
                f"{name}.group must return neighbors of shape [{tiles}, {patches - number}, neighbors], not "
                f"{list(neighbors.shape)}"
            )
        return groups

    def select(self, image: EncodedImage) -> Selection:
        """Return the selection of the tokens whose patches remain.

        Args:
            image: the encoded image; its layout contains the tokens that remain.
        """
        layout = image.geometry.to(image.device)
        return Selection(image.geometry, layout.valid, image.geometry.valid_tokens)


@dataclass
class PatchDropReducer(EncoderReducer, ABC):
    """A strategy that drops the patches with the smallest scores at layers of the vision tower."""

    @abstractmethod
    def score(self, image: EncodedImage) -> Tensor:
        """Return the score of each patch, `[tiles, patches]`; larger scores are kept first."""

    def group(self, image: EncodedImage, number: int) -> PatchGroups:
        """Return the patches with the largest scores of each tile, in the order of the sequence."""
        scores, expected = self.score(image), (image.geometry.tiles, image.geometry.tokens)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
            shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{type(self).__name__}.score must return [tiles, patches] = {list(expected)}, not {shape}"
            )
        raise_if(scores.isnan().any(), f"{type(self).__name__}.score returned NaN; a score must be a number")
        valid = image.geometry.to(scores.device).valid
        scores = scores.float().clamp(min=torch.finfo(torch.float32).min).masked_fill(~valid, -torch.inf)
        kept = scores.argsort(dim=1, descending=True, stable=True)[:, :number]
        return PatchGroups(kept.sort(dim=1).values)


@dataclass
class PatchMergeReducer(EncoderReducer, ABC):
    """A strategy that merges similar patches in every layer of the vision tower.

    Args:
        budget: patches of a tile that remain after the last layer; the layers merge equally many patches.
        r: number of patches that each layer merges, in place of a budget (ToMe's ``r``).
        proportional: whether attention counts a merged patch as often as the patches that it represents.
    """

    schedule: tuple[tuple[int | float, int | float], ...] = field(init=False, default=())
    r: int | None = field(default=None, kw_only=True)
    proportional: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: if both a budget and a number of patches per layer are set, or neither.
        """
        if self.r is not None and (self.budget is not None and self.budget != self._default_budget(())):
            raise ValueError(
                f"{type(self).__name__} got budget={self.budget!r} and r={self.r!r}; set the patches that remain, or "
                "the patches that each layer merges"
            )
        if self.r is not None and (not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 0):
            raise ValueError(f"r={self.r!r} is no number of patches; write an int from 0, such as r=8")
        super().__post_init__()

    def _default_budget(self, amounts: Sequence[int | float]) -> int | float:
        """Return the budget if none is set: half of the patches."""
        return 0.5

    @property
    def merges(self) -> bool:
        """True."""
        return True

    @property
    def proportional_attention(self) -> bool:
        """The option `proportional`."""
        return self.proportional

    @property
    def budget_label(self) -> str:
        """The patches that remain, or the patches that each layer merges."""
        return super().budget_label if self.r is None else f"r={self.r} per layer"

    def list_steps(self, patches: int, layers: int) -> Mapping[int, int]:
        """Return the number of patches of a tile that remain after each layer.

        A layer merges at most half of its patches. If the budget cannot be reached, a warning states how many patches
        remain.

        Args:
            patches: number of patches of a tile.
            layers: number of layers that run.
        """
        steps, left = {}, patches
        total = patches - count_patches(parse_amount(self.budget), patches)
        for layer in range(layers):
            merged = self.r if self.r is not None else total * (layer + 1) // layers - (patches - left)
            left -= min(max(merged, 0), left // 2)
            steps[layer] = left
        if self.r is None and left > patches - total:
            warnings.warn(
                f"{type(self).__name__} leaves {left} of {patches} patches of a tile, not {patches - total}: a layer "
                f"merges at most half of its patches, and {layers} layers run; set a larger budget, or drop tokens "
                "after the tower, such as ToMe(r=8) >> HiRED(0.1)",
                UnreachableBudgetWarning,
                stacklevel=2,
            )
        return steps

    @abstractmethod
    def metric(self, image: EncodedImage) -> Tensor:
        """Return the vectors by which patches are compared, `[tiles, patches, width]`."""

    def match(self, image: EncodedImage, metric: Tensor, number: int) -> PatchGroups:
        """Return the groups of similar patches; by default of bipartite soft matching.

        Args:
            image: the tiles of a call at the layer of the step.
            metric: the result of `metric`.
            number: number of patches of a tile that remain.
        """
        has_cls = ("cls_features", image.feature_layer) in image.signals
        return match_bipartite(metric, metric.shape[1] - number, has_cls)

    def group(self, image: EncodedImage, number: int) -> PatchGroups:
        """Return the groups of similar patches of each tile."""
        return self.match(image, self.metric(image), number)


def count_patches(amount: int | float, patches: int) -> int:
    """Return the number of patches of an amount, at least 1.

    Args:
        amount: a ratio as a float, or a count.
        patches: number of patches of a tile.
    """
    if isinstance(amount, int):
        return max(1, min(amount, patches))
    return max(1, int(Fraction(amount).limit_denominator(MAX_DENOMINATOR) * patches))
