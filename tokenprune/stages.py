"""Stages: the places in a model where a strategy acts.

A stage encodes the images of a call and returns the features that enter the LLM. The pipeline calls the stage of its
strategy. Stages are objects, so that a new stage adds one class and no comparison of names in other modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokenprune.capabilities import ProjectsMixtures, Resizable, require_capability
from tokenprune.geometry import NEWLINE
from tokenprune.image import EncodedImage, Signal

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter, Encoding
    from tokenprune.selection import Selection


@dataclass(frozen=True)
class Stage(ABC):
    """One place in a model where tokens are reduced."""

    name: ClassVar[str]
    """The name in tables and records."""

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    @abstractmethod
    def encode(
        self,
        adapter: Adapter,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int,
        text_model: str | None,
        truncated: bool,
    ) -> Encoding:
        """Return the encoding of the images of a call, as the strategy reads it.

        Args:
            adapter: the adapter of the model.
            inputs: the model inputs of the call.
            needs: the signals to capture.
            keep_pixels: number of images that keep their pixels for drawing.
            text_model: the CLIP checkpoint whose projections align features with text.
            truncated: whether the encoding may stop at the last required layer and complete only the kept tokens.
        """

    @abstractmethod
    def gather_features(
        self,
        adapter: Adapter,
        encoding: Encoding,
        images: Sequence[EncodedImage],
        selections: Sequence[Selection],
    ) -> list[Tensor]:
        """Return the features that enter the LLM, `[kept, dim]` per image.

        Args:
            adapter: the adapter of the model.
            encoding: the encoding of the images.
            images: the images as the strategy reads them.
            selections: the selections of the strategy.
        """


class ProjectorStage(Stage):
    """Between the vision tower and the LLM: only kept, merged and ordered visual tokens enter the LLM."""

    name: ClassVar[str] = "projector"

    def encode(
        self,
        adapter: Adapter,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int,
        text_model: str | None,
        truncated: bool,
    ) -> Encoding:
        """Run the vision tower and the projector once, and capture the needed signals."""
        return adapter.encode(inputs, needs, keep_pixels, text_model, truncated)

    def gather_features(
        self,
        adapter: Adapter,
        encoding: Encoding,
        images: Sequence[EncodedImage],
        selections: Sequence[Selection],
    ) -> list[Tensor]:
        """Return kept tokens or their mixtures in the order of the selection; newline tokens keep their positions."""
        masks = [s.packed_mask().to(image.device) for s, image in zip(selections, images, strict=True)]
        kept = encoding.gather_kept(masks)
        packed = encoding.packed if any(s.mixing is not None and not s.before_projector for s in selections) else None
        out = []
        for number, (selection, image, mask) in enumerate(zip(selections, images, masks, strict=True)):
            features = kept[number]
            if selection.mixing is None and selection.order is None:
                out.append(features)
                continue
            is_token = selection.geometry.packed.to(features.device)[mask] != NEWLINE
            tokens = features[is_token]
            if selection.mixing is not None:
                mixing = selection.mixing.to(features.device)
                if packed is None or selection.before_projector:
                    sources = gather_mixing_sources(image, mixing.shape[1])
                    projector = require_capability(adapter, ProjectsMixtures)
                    tokens = projector.project(mix(mixing, sources)).to(features.dtype)
                else:
                    tokens = mix(mixing, selection.geometry.unpack(packed[number]).flatten(0, 1))
            if selection.order is not None:
                tokens = tokens[selection.order.to(tokens.device)]
            features = features.clone()
            features[is_token] = tokens
            out.append(features)
        return out


class ImageStage(Stage):
    """Before the vision tower: images are encoded at a lower resolution."""

    name: ClassVar[str] = "image"

    def encode(
        self,
        adapter: Adapter,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int,
        text_model: str | None,
        truncated: bool,
    ) -> Encoding:
        """Return an encoding with the layouts of the images and without features."""
        return require_capability(adapter, Resizable).build_unencoded(inputs, keep_pixels)

    def gather_features(
        self,
        adapter: Adapter,
        encoding: Encoding,
        images: Sequence[EncodedImage],
        selections: Sequence[Selection],
    ) -> list[Tensor]:
        """Return features encoded at the resolution of the selection, without newline tokens if none is kept."""
        count = len(encoding.images) // encoding.repeats
        grids = [selection.resized_grid for selection in selections[:count]]
        encoded = require_capability(adapter, Resizable).encode_resized(encoding.inputs, grids)
        out = []
        for number, selection in enumerate(selections):
            grid, features = grids[number % count], encoded[number % count]
            if grid is not None and not selection.kept_newlines:
                packed = selection.geometry.resized(grid)[0].packed.to(features.device)
                features = features[packed != NEWLINE]
            out.append(features)
        return out


def mix(mixing: Tensor, sources: Tensor) -> Tensor:
    """Return mixtures of vectors, `[kept, width]`; computed in float32 because sums in half precision are inexact.

    Args:
        mixing: weights, `[kept, sources]`, sparse or dense.
        sources: the mixed vectors, `[sources, width]`.
    """
    return (mixing.to(torch.float32) @ sources.float()).to(sources.dtype)


def gather_mixing_sources(image: EncodedImage, columns: int) -> Tensor:
    """Return the vectors that a mixing matrix combines before the projector, `[columns, width]`.

    Args:
        image: the encoded image.
        columns: number of columns of the matrix: the tokens, optionally followed by the CLS token of each tile.
    """
    tokens = image.projector_inputs().flatten(0, 1)
    return tokens if columns == len(tokens) else torch.cat([tokens, image.cls_features("feature")[:, 0]])


def compute_entry_positions(selection: Selection, mask: Tensor) -> Tensor:
    """Return the packed positions of the kept tokens in the order in which they enter the LLM, `[kept]`.

    Args:
        selection: the selection of the image.
        mask: kept positions of the packed image, bool `[length]`.
    """
    positions = mask.nonzero()[:, 0]
    if selection.order is not None:
        is_token = selection.geometry.packed.to(mask.device)[positions] != NEWLINE
        positions[is_token] = positions[is_token][selection.order.to(mask.device)]
    return positions
