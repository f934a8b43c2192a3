"""Reduces the images of a call: images of one layout together, so that the work on the host does not grow with them.

A strategy selects the tokens of one image. `torch.vmap` runs the same function on several images at once. If a strategy
reads values from the device (`tolist`, `nonzero`, ...) or draws random numbers, its images are reduced one after
another.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.faults import Fault, collect_faults, report_fault
from tokenprune.image import EncodedImage, SignalKey
from tokenprune.selection import TENSOR_FIELDS, MaskCount, Selection

if TYPE_CHECKING:
    from tokenprune.reducer import TokenReducer


VALUE_FIELDS = frozenset(field.name for field in fields(Selection)) - {*TENSOR_FIELDS, "pixels"}
"""Fields of a selection that are equal for all images that are reduced together."""


class _FeaturesReadError(Exception):
    """A strategy read the features of an image, which were not computed."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """The selections of the images of a call, and the checks that are not read so far.

    Args:
        selections: one selection per image.
        faults: the checks of the selections.
    """

    selections: list[Selection]
    faults: list[Fault]


class BatchReducer:
    """Applies a strategy to the images of a call.

    Args:
        reducer: the strategy.
    """

    def __init__(self, reducer: TokenReducer) -> None:
        self.reducer = reducer
        self._supports_vmap = True
        self._reads_features = False

    def reduce(self, images: Sequence[EncodedImage]) -> Reduction:
        """Return the selection of each image; an image that occurs several times is reduced once.

        Args:
            images: the encoded images.
        """
        selections: dict[EncodedImage, Selection] = {}
        with collect_faults() as faults:
            for group in group_images(dict.fromkeys(images)):
                selections.update(zip(group, self._reduce_group(group), strict=True))
        return Reduction([selections[image] for image in images], faults)

    def _reduce_group(self, images: list[EncodedImage]) -> list[Selection]:
        """Return the selections of images with one layout and signals of one shape."""
        if len(images) == 1 or not self._supports_vmap:
            return [self.reducer.reduce(image) for image in images]
        try:
            selections, flags = self._reduce_together(images)
        except Exception:  # an operator without a batching rule, a read, or an error of the strategy
            selections = [self.reducer.reduce(image) for image in images]  # raises the error of a strategy
            self._supports_vmap = False
            return selections
        for fault in flags:
            report_fault(fault.flag.any(), fault.message)
        return selections

    def _reduce_together(self, images: list[EncodedImage]) -> tuple[list[Selection], list[Fault]]:
        """Return the selections of images of one layout from one vectorized call, and the checks."""
        try:
            return self._vectorize(images, self._reads_features)
        except _FeaturesReadError:
            self._reads_features = True
            return self._vectorize(images, True)

    def _vectorize(self, images: list[EncodedImage], reads_features: bool) -> tuple[list[Selection], list[Fault]]:
        template: list[tuple[Selection, dict[str, int | None], list[str]]] = []

        def reduce_image(
            tensors: Mapping[SignalKey, Tensor], features: Tensor | None, number: Tensor
        ) -> tuple[Any, list[Tensor]]:
            compute = _refuse_features if features is None else (lambda: features)
            image = replace(images[0], signals=tensors, compute_features=compute, pixels=None)
            with collect_faults() as faults:
                selection = self.reducer.reduce(image)
            if any(isinstance(getattr(selection, name), Tensor) for name in VALUE_FIELDS):
                raise TypeError("a tensor in place of a number has another value for each image")
            counts = {"kept": selection.token_count, "newline_mask": selection.newline_count}
            template.append((selection, counts, [fault.message for fault in faults]))
            values = {name: getattr(selection, name) for name in TENSOR_FIELDS}
            return {n: v for n, v in values.items() if v is not None}, [fault.flag for fault in faults]

        signals = {key: torch.stack([image.signals[key] for image in images]) for key in images[0].signals}
        features = torch.stack([image.features for image in images]) if reads_features else None
        numbers = torch.arange(len(images))  # defines the number of images if the strategy reads the layout only
        in_dims = (0, 0 if reads_features else None, 0)
        # An error for random numbers: each image gets its own, so the images are reduced one after another.
        tensors, flags = torch.vmap(reduce_image, in_dims=in_dims, randomness="error")(signals, features, numbers)
        values = {name: value.unbind() for name, value in tensors.items()}
        selection, counts, messages = template[0]
        rebuilt = [
            _rebuild(selection, {name: parts[number] for name, parts in values.items()}, counts, image)
            for number, image in enumerate(images)
        ]
        return rebuilt, [Fault(flag, message) for flag, message in zip(flags, messages, strict=True)]


def _refuse_features() -> Tensor:
    raise _FeaturesReadError


def _rebuild(
    template: Selection, tensors: Mapping[str, Tensor], counts: Mapping[str, int | None], image: EncodedImage
) -> Selection:
    """Return the selection of one image of a group.

    Args:
        template: the selection inside the vectorized call.
        tensors: the tensors of the image by field.
        counts: number of true entries of the masks, None if it is not known.
        image: the image.
    """
    known = tuple(MaskCount.of(tensors[name], number) for name, number in counts.items() if number is not None)
    changes: dict[str, Any] = {**tensors, "counts": known, "pixels": image.pixels}
    return replace(template, **changes)


def group_images(images: Iterable[EncodedImage]) -> list[list[EncodedImage]]:
    """Return the images in groups of one layout, with signals of the same kinds, layers and shapes.

    Args:
        images: the encoded images.
    """
    groups: dict[Hashable, list[EncodedImage]] = {}
    for image in images:
        shapes = tuple(sorted((key, tuple(value.shape), str(value.dtype)) for key, value in image.signals.items()))
        depths = tuple(sorted(image.depths.items()))
        groups.setdefault((image.geometry.host, shapes, depths, image.device), []).append(image)
    return list(groups.values())
