"""Sources of saliency for vision towers without a CLS token.

A strategy requires the signal ``"cls_attention"``. If the tower has no CLS token, a substitute is read:

* the attention that each token receives from the other tokens, as VisionZip uses for SigLIP (Yang et al., CVPR 2025,
  arXiv 2412.04467);
* the attention of the query in SigLIP's pooling head;
* the attention of a saliency model on the same tiles.

`Run.attention` stores the source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from tokenprune.contracts import describe_value, locate_method
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice, resolve_layers
from tokenprune.policies import Component

Attention: TypeAlias = Literal["auto", "cls", "received", "pooling"]
"""The source of attention over the tokens of a tile; ``"auto"`` is CLS attention if available, else received attention.
"""
SOURCES: Mapping[str, str] = {
    "cls": "cls_attention",
    "received": "received_attention",
    "pooling": "pooling_attention",
}
"""The kind of signal that each source reads."""
SALIENCY_SOURCE = "saliency_model"
"""The source if a saliency model replaces the signals of the vision tower."""


class SaliencyOutput(NamedTuple):
    """The attention of a saliency model over the tokens of an image.

    Args:
        rows: CLS attention by layer of the saliency model, `[tiles, heads, tokens]` each.
        layers: number of layers of the saliency model.
        feature_layer: index of the layer that the choice ``"feature"`` selects.
        flops: FLOPs of the forward passes.
    """

    rows: Mapping[int, Tensor]
    layers: int
    feature_layer: int
    flops: int


@dataclass
class SaliencyModel(Component, ABC):
    """A second model that encodes the same tiles; its attention replaces the CLS attention of the vision tower.

    Args:
        image_mean: mean of the colors with which the processor of the VLM normalizes images. By default, mean and
            standard deviation are read from the processor file in the folder or hub id of the VLM.
        image_std: standard deviation of the colors.
    """

    image_mean: list[float] | None = field(default=None, kw_only=True)
    image_std: list[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options when the model is created."""
        super().__post_init__()
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std belong together; give both or none")

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the model in records."""

    @abstractmethod
    def compute_attention(
        self, images: Tensor, token_grid: tuple[int, int], layers: Sequence[LayerChoice]
    ) -> SaliencyOutput:
        """Return the attention of the model over the tokens of one image.

        Args:
            images: the tiles of the image, colors from 0 to 1, `[tiles, 3, height, width]`.
            token_grid: height x width of the tokens of a tile.
            layers: the layers to read, resolved against the depth of this model.
        """


def resolve_attention_source(choice: Attention | SaliencyModel, provides: Collection[str]) -> str:
    """Return the kind of signal that a strategy reads as ``"cls_attention"``, or `SALIENCY_SOURCE`.

    Args:
        choice: the `attention` of the strategy.
        provides: kinds of signals that the model provides.
    """
    if isinstance(choice, SaliencyModel):
        return SALIENCY_SOURCE
    if choice == "auto":
        return next((SOURCES[name] for name in ("cls", "received") if SOURCES[name] in provides), SOURCES["cls"])
    return SOURCES[choice]


def resolve_needs(needs: Sequence[Signal], source: str) -> list[Signal]:
    """Return the signals to capture in the vision tower if `source` replaces CLS attention.

    Args:
        needs: the signals that a strategy declares.
        source: the kind of signal that replaces ``"cls_attention"``, or `SALIENCY_SOURCE`.
    """
    if source == SALIENCY_SOURCE:
        return [signal for signal in needs if signal.kind != SOURCES["cls"]]
    return [signal._replace(kind=source) if signal.kind == SOURCES["cls"] else signal for signal in needs]


def with_cls_substitute(image: EncodedImage, needs: Sequence[Signal], source: str) -> EncodedImage:
    """Return an image whose CLS attention is read from another signal of the image.

    Args:
        image: the encoded image, with the signal captured.
        needs: the signals that the strategy declares.
        source: the kind of signal to read; if it is CLS attention itself, the image is returned unchanged.
    """
    layers = {
        layer
        for choice in list_attention_layers(needs)
        for layer in resolve_layers(choice, image.layers, image.feature_layer)
    }
    if source == SOURCES["cls"] or not layers:
        return image

    return image.with_signals({(SOURCES["cls"], layer): image.signals[source, layer] for layer in layers})


def with_saliency(
    image: EncodedImage, model: SaliencyModel, images: Tensor, needs: Sequence[Signal]
) -> tuple[EncodedImage, int]:
    """Return an image whose CLS attention is computed by a saliency model, and the FLOPs of that model.

    Args:
        image: the encoded image.
        model: the saliency model.
        images: the tiles of the image, colors from 0 to 1, base tile first, `[tiles, 3, height, width]`.
        needs: the signals that the strategy declares.

    Raises:
        TypeError: if the model returns no `SaliencyOutput`.
    """
    output = model.compute_attention(images, image.geometry.token_grid, list_attention_layers(needs))
    if not isinstance(output, SaliencyOutput):
        raise TypeError(
            f"{type(model).__name__}.compute_attention must return a SaliencyOutput, not {describe_value(output)}"
            f"{locate_method(model, 'compute_attention')}"
        )
    signals = {(SOURCES["cls"], layer): rows for layer, rows in output.rows.items()}
    return image.with_signals(signals, {SOURCES["cls"]: (output.layers, output.feature_layer)}), output.flops


def list_attention_layers(needs: Sequence[Signal]) -> list[LayerChoice]:
    """Return the layers from which a strategy reads CLS attention."""
    layers = (signal.layer for signal in needs if signal.kind == SOURCES["cls"])
    return [layer for layer in layers if layer != "before"]


def resample_attention(attention: Tensor, grid: tuple[int, int], token_grid: tuple[int, int]) -> Tensor:
    """Resample attention from a grid of patches to a grid of tokens, so that the sum of each head is preserved.

    Along an axis with more tokens than patches, attention is interpolated linearly. Otherwise it is divided by area.

    Args:
        attention: attention over patches in row-major order, `[tiles, heads, patches]`.
        grid: height x width of the patches.
        token_grid: height x width of the tokens.

    Returns:
        Attention over tokens, `[tiles, heads, tokens]`.
    """
    if grid == token_grid:
        return attention
    device, dtype = attention.device, attention.dtype
    rows, cols = (_axis_shares(old, new, device, dtype) for old, new in zip(grid, token_grid, strict=True))
    on_grid = rearrange(attention, "tiles heads (h w) -> tiles heads h w", h=grid[0])
    resampled = einsum(rows, cols, on_grid, "rows h, cols w, tiles heads h w -> tiles heads rows cols")
    return rearrange(resampled, "tiles heads rows cols -> tiles heads (rows cols)")


@lru_cache(maxsize=64)
def _axis_shares(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the share of each old cell in each new cell along one axis, `[new, old]`; columns sum to 1."""
    with torch.inference_mode(False):  # a later call may record gradients
        if new > old:
            shares = F.interpolate(torch.eye(old)[None], new, mode="linear", align_corners=False)[0].T
            return (shares / shares.sum(dim=0)).to(device, dtype)
        edges = torch.arange(new + 1, dtype=torch.float64) * old / new
        cells = torch.arange(old, dtype=torch.float64)
        inside = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
        return inside.clamp(min=0).to(device, dtype)
