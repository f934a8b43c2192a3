"""What stands in for the attention of a CLS token: many vision towers have none.

A strategy asks for ``"cls_attention"``. In a tower without a CLS token the attention that each token receives from all
others takes its place, as VisionZip does for SigLIP (Yang et al., CVPR 2025, arXiv 2412.04467), or the attention of the
probe with which SigLIP's head pools its tokens, or a second model looks at the same tiles. What was read is said by
`Run.attention`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice, resolve_layers
from tokenprune.policies import Component

Attention: TypeAlias = Literal["auto", "cls", "received", "pooling"]
"""Where attention over the tokens of a tile comes from; ``"auto"``: CLS if there is one, else what tokens receive."""
SOURCES: Mapping[str, str] = {
    "cls": "cls_attention",
    "received": "received_attention",
    "pooling": "pooling_attention",
}
"""The signal that each choice reads."""
SECOND_LOOK = "saliency_model"
"""Stands for the signal if a second model is read."""


class SaliencyOutput(NamedTuple):
    """What a second model attends to.

    Args:
        rows: its CLS attention by layer, `[tiles, heads, tokens]` each.
        layers: number of its layers.
        feature_layer: index of the layer that is meant by ``"feature"``.
        flops: what looking took.
    """

    rows: Mapping[int, Tensor]
    layers: int
    feature_layer: int
    flops: int


@dataclass
class SaliencyModel(Component, ABC):
    """A second model that looks at the same tiles; its attention is read in place of the vision tower's.

    Args:
        image_mean: mean of the colors with which the VLM's processor normalizes images. Left out, mean and deviation
            are read from the processor's file in the VLM's own folder or hub id.
        image_std: standard deviation of the colors, likewise.
    """

    image_mean: list[float] | None = field(default=None, kw_only=True)
    image_std: list[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options once."""
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std belong together; give both or none")

    @property
    @abstractmethod
    def name(self) -> str:
        """What the records call it."""

    @abstractmethod
    def look(self, images: Tensor, token_grid: tuple[int, int], layers: Sequence[LayerChoice]) -> SaliencyOutput:
        """Return what the model attends to.

        Args:
            images: the tiles of one image, colors from 0 to 1, `[tiles, 3, height, width]`.
            token_grid: height x width of the tokens of a tile.
            layers: the layers to read, to be resolved on the depth of this model.
        """


def attention_source(choice: Attention | SaliencyModel, provides: Collection[str]) -> str:
    """Return the kind of signal that a strategy is given as ``"cls_attention"``, or `SECOND_LOOK`.

    Args:
        choice: what the strategy's `attention` says.
        provides: kinds of signals that the model gives.
    """
    if isinstance(choice, SaliencyModel):
        return SECOND_LOOK
    if choice == "auto":
        return next((SOURCES[one] for one in ("cls", "received") if SOURCES[one] in provides), SOURCES["cls"])
    return SOURCES[choice]


def read_from(needs: Sequence[Signal], source: str) -> list[Signal]:
    """Return the signals to capture in the vision tower so that `source` can stand in for CLS attention.

    Args:
        needs: what a strategy declares.
        source: kind of the signal that is read in place of ``"cls_attention"``, or `SECOND_LOOK`.
    """
    if source == SECOND_LOOK:
        return [one for one in needs if one.kind != SOURCES["cls"]]
    return [one._replace(kind=source) if one.kind == SOURCES["cls"] else one for one in needs]


def with_cls_substitute(image: EncodedImage, needs: Sequence[Signal], source: str) -> EncodedImage:
    """Return an image whose CLS attention is the signal that stands in for it.

    Args:
        image: the encoded image, with the signal captured.
        needs: what the strategy declares.
        source: kind of that signal; the image stays as it is if it is CLS attention itself.
    """
    layers = {
        layer
        for choice in attention_layers(needs)
        for layer in resolve_layers(choice, image.layers, image.feature_layer)
    }
    if source == SOURCES["cls"] or not layers:
        return image

    return image.with_signals({(SOURCES["cls"], layer): image.signals[source, layer] for layer in layers})


def with_saliency(
    image: EncodedImage, look: SaliencyModel, images: Tensor, needs: Sequence[Signal]
) -> tuple[EncodedImage, int]:
    """Return an image whose CLS attention is that of a second model, and the FLOPs that it took.

    Args:
        image: the encoded image.
        look: the second model.
        images: the tiles of the image, colors from 0 to 1, base tile first, `[tiles, 3, height, width]`.
        needs: what the strategy declares.
    """
    seen = look.look(images, image.geometry.token_grid, attention_layers(needs))
    found = {(SOURCES["cls"], layer): rows for layer, rows in seen.rows.items()}
    return image.with_signals(found, {SOURCES["cls"]: (seen.layers, seen.feature_layer)}), seen.flops


def attention_layers(needs: Sequence[Signal]) -> list[LayerChoice]:
    """Return the layers of which a strategy reads CLS attention."""
    return [signal.layer for signal in needs if signal.kind == SOURCES["cls"]]


def resampled(attention: Tensor, grid: tuple[int, int], token_grid: tuple[int, int]) -> Tensor:
    """Lay attention over another grid: what each patch was paid is divided among the tokens there, so sums stay.

    Towards fewer rows or columns a token gets its share by area, towards more ones by linear interpolation.

    Args:
        attention: attention over patches in row-major order, `[tiles, heads, patches]`.
        grid: height x width of the patches.
        token_grid: height x width of the tokens.

    Returns:
        Attention over tokens, `[tiles, heads, tokens]`.
    """
    if grid == token_grid:
        return attention
    down, across = (_shares(old, new).to(attention) for old, new in zip(grid, token_grid, strict=True))
    on_grid = rearrange(attention, "tiles heads (h w) -> tiles heads h w", h=grid[0])
    laid = einsum(down, across, on_grid, "rows h, cols w, tiles heads h w -> tiles heads rows cols")
    return rearrange(laid, "tiles heads rows cols -> tiles heads (rows cols)")


def _shares(old: int, new: int) -> Tensor:
    """Return which share of each old cell goes to each new one along an axis, `[new, old]`; columns sum to 1."""
    if new > old:
        shares = F.interpolate(torch.eye(old)[None], new, mode="linear", align_corners=False)[0].T
        return shares / shares.sum(dim=0)
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    cells = torch.arange(old, dtype=torch.float64)
    inside = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    return inside.clamp(min=0)
