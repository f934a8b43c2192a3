"""Stages: the points of a model at which a strategy acts.

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
from tokenprune.packing import KeptPositions, group_selections

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter, Encoding
    from tokenprune.encoder_reducer import EncoderReducer
    from tokenprune.selection import Selection


STAGE_ORDER = ("image", "encoder", "projector", "decoder")
"""Names of the stages in the order in which a model runs them."""


@dataclass(frozen=True)
class Stage:
    """One point of a model at which tokens are reduced."""

    name: ClassVar[str]
    """The name in tables and records."""
    reads_llm: ClassVar[bool] = False
    """Whether a strategy of this stage can read signals of the LLM."""
    reads_tower_layer: ClassVar[bool] = False
    """Whether a strategy of this stage reads signals of a layer of the vision tower while the tower runs."""
    reads_pixels: ClassVar[bool] = False
    """Whether a strategy of this stage reads the pixels of the images before the vision tower runs."""
    resizes: ClassVar[bool] = False
    """Whether images are encoded at another resolution."""

    @property
    def reduces_patches(self) -> bool:
        """Whether layers of the vision tower run on a part of the patches."""
        return self.reads_tower_layer or self.reads_pixels

    def __str__(self) -> str:
        """Return the name."""
        return self.name


class EntryStage(Stage, ABC):
    """A stage that determines which features enter the LLM."""

    @abstractmethod
    def encode(
        self,
        adapter: Adapter,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int,
        text_model: str | None,
        truncated: bool,
        patch_reducers: Sequence[EncoderReducer] = (),
        entering: Sequence[Selection] | None = None,
    ) -> Encoding:
        """Return the encoding of the images of a call, as the strategy reads it.

        Args:
            adapter: the adapter of the model.
            inputs: the model inputs of the call.
            needs: the signals to capture.
            keep_pixels: number of images that keep their pixels for drawing.
            text_model: the CLIP checkpoint whose projections align features with text.
            truncated: whether the encoding may stop at the last required layer and complete only the kept tokens.
            patch_reducers: strategies that drop or merge patches inside the vision tower.
            entering: the selection of each image whose patches enter the vision tower; None encodes all patches.
        """

    @abstractmethod
    def gather_features(
        self,
        adapter: Adapter,
        encoding: Encoding,
        images: Sequence[EncodedImage],
        selections: Sequence[Selection],
        kept_positions: KeptPositions,
    ) -> list[Tensor]:
        """Return the features that enter the LLM, `[kept, dim]` per image.

        Args:
            adapter: the adapter of the model.
            encoding: the encoding of the images.
            images: the images as the strategy reads them.
            selections: the selections of the strategy.
            kept_positions: the kept positions of the selections.
        """


class ProjectorStage(EntryStage):
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
        patch_reducers: Sequence[EncoderReducer] = (),
        entering: Sequence[Selection] | None = None,
    ) -> Encoding:
        """Run the vision tower and the projector once, and capture the needed signals."""
        return adapter.encode(inputs, needs, keep_pixels, text_model, truncated, patch_reducers, entering)

    def gather_features(
        self,
        adapter: Adapter,
        encoding: Encoding,
        images: Sequence[EncodedImage],
        selections: Sequence[Selection],
        kept_positions: KeptPositions,
    ) -> list[Tensor]:
        """Return kept tokens or their mixtures in the order of the selection; newline tokens keep their positions."""
        if all(selection.is_mixed for selection in selections):
            return mix_and_order(adapter, encoding, images, selections, kept_positions, None)
        kept = encoding.gather_kept(kept_positions)
        if not any(selection.is_mixed or selection.is_ordered for selection in selections):
            return kept
        return mix_and_order(adapter, encoding, images, selections, kept_positions, torch.cat(kept))


class EncoderStage(ProjectorStage):
    """Inside the vision tower: layers from a step on run on the patches that remain (`tokenprune.encoder`)."""

    name: ClassVar[str] = "encoder"
    reads_tower_layer: ClassVar[bool] = True


class PixelStage(ProjectorStage):
    """Before the vision tower: it runs on the patches of the kept tokens only."""

    name: ClassVar[str] = "image"
    reads_pixels: ClassVar[bool] = True


class ImageStage(EntryStage):
    """Before the vision tower: images are encoded at a lower resolution."""

    name: ClassVar[str] = "image"
    resizes: ClassVar[bool] = True

    def encode(
        self,
        adapter: Adapter,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int,
        text_model: str | None,
        truncated: bool,
        patch_reducers: Sequence[EncoderReducer] = (),
        entering: Sequence[Selection] | None = None,
    ) -> Encoding:
        """Return an encoding with the layouts of the images and without features."""
        return require_capability(adapter, Resizable).build_unencoded(inputs, keep_pixels)

    def gather_features(
        self,
        adapter: Adapter,
        encoding: Encoding,
        images: Sequence[EncodedImage],
        selections: Sequence[Selection],
        kept_positions: KeptPositions,
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


class DecoderStage(Stage):
    """Inside the LLM: layers from a cut on run on the tokens that remain (`tokenprune.decoder`)."""

    name: ClassVar[str] = "decoder"
    reads_llm: ClassVar[bool] = True


class SeveralStages(Stage):
    """The stages of a composition, each with a strategy."""

    name: ClassVar[str] = "several"


def mix_and_order(
    adapter: Adapter,
    encoding: Encoding,
    images: Sequence[EncodedImage],
    selections: Sequence[Selection],
    kept_positions: KeptPositions,
    features: Tensor | None,
) -> list[Tensor]:
    """Return kept features with mixtures in place of mixed tokens, and tokens in their order, `[kept, dim]` per image.

    Args:
        adapter: the adapter of the model.
        encoding: the encoding of the images.
        images: the images as the strategy reads them.
        selections: the selections of the strategy.
        kept_positions: the kept positions of the selections.
        features: the features at the kept positions of all images without mixing, `[positions, dim]`; None if all
            tokens are mixtures.
    """
    index_by_image = kept_positions.token_index.split(list(kept_positions.tokens))
    packed = encoding.packed if any(s.is_mixed and not s.before_projector for s in selections) else []
    for numbers in group_selections(selections, "token_count", "before_projector", "is_mixed", "is_ordered"):
        group = [selections[number] for number in numbers]
        if not (group[0].is_mixed or group[0].is_ordered):
            continue
        index = torch.stack([index_by_image[number] for number in numbers])
        if features is not None and not group[0].is_mixed:
            tokens = features[index]
        elif group[0].before_projector:
            mixed = mix_images(group, [gather_mixing_sources(images[n], selections[n]) for n in numbers])
            projected = require_capability(adapter, ProjectsMixtures).project(mixed.flatten(0, 1))
            tokens = projected.view(*index.shape, projected.shape[-1])  # without kept tokens, -1 is ambiguous
        else:
            sources = [group[0].geometry.unpack(packed[number]).flatten(0, 1) for number in numbers]
            tokens = mix_images(group, sources)
        if orders := [selection.order for selection in group if selection.order is not None]:
            order = torch.stack(orders).to(tokens.device)
            tokens = tokens.gather(1, order[..., None].expand_as(tokens))
        base = expand_newline(images, kept_positions, tokens) if features is None else features
        features = base.index_copy(0, index.flatten(), tokens.flatten(0, 1).to(base.dtype))
    return [] if features is None else list(features.split(kept_positions.lengths))


def expand_newline(images: Sequence[EncodedImage], kept_positions: KeptPositions, tokens: Tensor) -> Tensor:
    """Return the newline token at every kept position, `[positions, dim]`, to be overwritten by the visual tokens.

    Args:
        images: the encoded images.
        kept_positions: the kept positions.
        tokens: visual tokens, `[..., dim]`, which define dtype and device.
    """
    newline = images[0].newline
    row = tokens.new_zeros(tokens.shape[-1]) if newline is None else newline.to(tokens.dtype)
    return row.expand(sum(kept_positions.lengths), -1)


def mix_images(selections: Sequence[Selection], sources: Sequence[Tensor]) -> Tensor:
    """Return the mixtures of several images, `[images, kept, width]`.

    On a CPU the images are mixed one after another by sparse matrices, which is faster there.

    Args:
        selections: selections with mixing matrices of one shape.
        sources: the mixed vectors of each image, `[sources, width]`.
    """
    mixings = [selection.mixing.to(sources[0].device) for selection in selections if selection.mixing is not None]
    if sources[0].device.type == "cpu" or any(mixing.is_sparse for mixing in mixings):
        return torch.stack([mix(mixing, source) for mixing, source in zip(mixings, sources, strict=True)])
    return mix(torch.stack(mixings), torch.stack(list(sources)))


def mix(mixing: Tensor, sources: Tensor) -> Tensor:
    """Return mixtures of vectors, `[..., kept, width]`; computed in float32 because sums in half precision are inexact.

    Args:
        mixing: weights, `[..., kept, sources]`, sparse or dense.
        sources: the mixed vectors, `[..., sources, width]`.
    """
    weights = mixing.to(torch.float32)
    weights = weights if weights.is_sparse or weights.device.type != "cpu" else weights.to_sparse()
    return (weights @ sources.float()).to(sources.dtype)


def gather_mixing_sources(image: EncodedImage, selection: Selection) -> Tensor:
    """Return the vectors that a mixing matrix combines before the projector, `[sources, width]`.

    Args:
        image: the encoded image.
        selection: its selection; the columns of its matrix are the tokens, optionally followed by the CLS token of
            each tile.
    """
    tokens = image.projector_inputs().flatten(0, 1)
    if selection.mixing is None or selection.mixing.shape[1] == len(tokens):
        return tokens
    return torch.cat([tokens, image.cls_features("feature")[:, 0]])


def order_positions(selections: Sequence[Selection], kept_positions: KeptPositions) -> list[Tensor]:
    """Return the index of each kept position in its packed image, in the order of the LLM, `[kept]` per image.

    Args:
        selections: the selections of the strategy.
        kept_positions: the kept positions of the selections.
    """
    positions = kept_positions.image_index
    if any(selection.order is not None for selection in selections):
        index_by_image = kept_positions.token_index.split(list(kept_positions.tokens))
        pairs = zip(index_by_image, selections, strict=True)
        index = [i if s.order is None else i[s.order.to(i.device)] for i, s in pairs]
        positions = positions.index_copy(0, kept_positions.token_index, positions[torch.cat(index)])
    return list(positions.split(kept_positions.lengths))
