"""Applies a strategy to all images of a call; images of one layout are reduced in one vectorized call.

A strategy selects the tokens of one image. `torch.vmap` runs the same function on several images at once. If a strategy
reads values from the device (`tolist`, `nonzero`, ...) or draws random numbers, its images are reduced one after
another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.checks import DeferredCheck, defer_checks, raise_if
from tokenprune.compiled import CompileOptions, GraphCache, compile_function, copy_outputs
from tokenprune.image import EncodedImage, SignalKey
from tokenprune.selection import TENSOR_FIELDS, MaskCount, Selection

if TYPE_CHECKING:
    from tokenprune.reducer import TokenReducer


VALUE_FIELDS = frozenset(field.name for field in fields(Selection)) - {*TENSOR_FIELDS, "pixels"}
"""Fields of a selection that are equal for all images that are reduced together."""


class _FeaturesReadError(Exception):
    """A strategy read the features of an image inside a vectorized call without features."""


@dataclass(frozen=True, eq=False)
class BatchSelection:
    """The selections of the images of a call, and the deferred checks of them.

    Args:
        selections: one selection per image.
        checks: the checks of the selections, not read from the device.
    """

    selections: list[Selection]
    checks: list[DeferredCheck]


class _ReducerGraph(NamedTuple):
    """A compiled strategy for images of one layout.

    Args:
        run: maps signals and features of the images to the tensors of the selections, and whether they are invalid.
        template: a selection with the same fields that are no tensors.
        counts: number of true entries of each mask by field; None if the mask must be counted.
        reads_features: whether the strategy reads the features.
    """

    run: Callable[..., Any]
    template: Selection
    counts: Mapping[str, int | None]
    reads_features: bool


class BatchSelector:
    """Selects the tokens of all images of a call with one strategy.

    Args:
        reducer: the strategy.
        compile_options: compiles a strategy that is a single graph; None compiles nothing.
    """

    def __init__(self, reducer: TokenReducer, compile_options: CompileOptions | None = None) -> None:
        self.reducer = reducer
        self._compile_options = compile_options if reducer.is_single_graph else None
        self._graphs = GraphCache()
        self._supports_vmap = True
        self._reads_features = False

    def select(self, images: Sequence[EncodedImage]) -> BatchSelection:
        """Return the selections of all images; an image that occurs several times is reduced once.

        Args:
            images: the encoded images.
        """
        selections: dict[EncodedImage, Selection] = {}
        with defer_checks() as checks:
            for group in group_images(dict.fromkeys(images)):
                selections.update(zip(group, self._reduce_group(group), strict=True))
        return BatchSelection([selections[image] for image in images], checks)

    def _reduce_group(self, images: list[EncodedImage]) -> list[Selection]:
        """Return the selections of images with one layout and signals of one shape."""
        if self._compile_options is not None:
            return self._reduce_compiled(images, self._compile_options)
        if len(images) == 1 or not self._supports_vmap:
            return [self.reducer.reduce(image) for image in images]
        try:
            selections, checks = self._reduce_together(images)
        except Exception:  # an operator without a batching rule, a read, or an error of the strategy
            selections = [self.reducer.reduce(image) for image in images]  # raises an error of the strategy
            self._supports_vmap = False
            return selections
        for check in checks:
            raise_if(check.failed.any(), check.message)
        return selections

    def _reduce_compiled(self, images: list[EncodedImage], options: CompileOptions) -> list[Selection]:
        """Return the selections of images of one layout from one compiled graph, and defer its check."""
        key = (len(images), group_key(images[0]))
        graph = self._graphs.get(key, lambda: self._compile(images[0], options))
        signals = [dict(image.signals) for image in images]
        features = [image.features for image in images] if graph.reads_features else None
        tensors, failed = copy_outputs(graph.run(signals, features))
        raise_if(
            failed.any(),
            f"{type(self.reducer).__name__} returned NaN scores, tokens that are not valid, or a wrong number of "
            "tokens; attach it without compile=True for the message of the failed check",
        )
        values = {name: value.unbind() for name, value in tensors.items()}
        return [
            _rebuild(graph.template, {name: parts[number] for name, parts in values.items()}, graph.counts, image)
            for number, image in enumerate(images)
        ]

    def _compile(self, image: EncodedImage, options: CompileOptions) -> _ReducerGraph:
        """Return the compiled strategy for images with the layout of an image, after one call without compilation."""
        reads: list[bool] = []

        def read_features() -> Tensor:
            reads.append(True)
            return image.features

        with defer_checks():  # this call copies the index tables of the layout to the device
            template = self.reducer.reduce(replace(image, compute_features=read_features, pixels=None))
        counts = {"kept": template.token_count, "newline_mask": template.newline_count}
        reducer, device = self.reducer, image.device
        layout = replace(image, signals={}, compute_features=_refuse_features, pixels=None)

        def reduce_image(signals: Mapping[SignalKey, Tensor], features: Tensor | None, number: Tensor) -> Any:
            compute = _refuse_features if features is None else (lambda: features)
            selection = reducer.reduce(replace(layout, signals=signals, compute_features=compute))
            values = {name: getattr(selection, name) for name in TENSOR_FIELDS}
            return {n: v for n, v in values.items() if v is not None}, is_invalid(selection, counts["kept"])

        def reduce_images(signals: list[dict[SignalKey, Tensor]], features: list[Tensor] | None) -> Any:
            stacked = {key: torch.stack([entry[key] for entry in signals]) for key in signals[0]}
            stacked_features = None if features is None else torch.stack(features)
            numbers = torch.arange(len(signals), device=device)  # as in `_vectorize`
            in_dims = (0, None if features is None else 0, 0)
            return torch.vmap(reduce_image, in_dims=in_dims)(stacked, stacked_features, numbers)

        run = compile_function(reduce_images, options, type(reducer).__name__)
        return _ReducerGraph(run, template, counts, bool(reads))

    def _reduce_together(self, images: list[EncodedImage]) -> tuple[list[Selection], list[DeferredCheck]]:
        """Return the selections of images of one layout from one vectorized call, and the checks."""
        try:
            return self._vectorize(images, self._reads_features)
        except _FeaturesReadError:
            self._reads_features = True
            return self._vectorize(images, True)

    def _vectorize(
        self, images: list[EncodedImage], reads_features: bool
    ) -> tuple[list[Selection], list[DeferredCheck]]:
        template: list[tuple[Selection, dict[str, int | None], list[str]]] = []

        def reduce_image(
            tensors: Mapping[SignalKey, Tensor], features: Tensor | None, number: Tensor
        ) -> tuple[Any, list[Tensor]]:
            compute = _refuse_features if features is None else (lambda: features)
            image = replace(images[0], signals=tensors, compute_features=compute, pixels=None)
            with defer_checks() as checks:
                selection = self.reducer.reduce(image)
            if any(isinstance(getattr(selection, name), Tensor) for name in VALUE_FIELDS):
                raise TypeError("a tensor in place of a number has another value for each image")
            counts = {"kept": selection.token_count, "newline_mask": selection.newline_count}
            template.append((selection, counts, [check.message for check in checks]))
            values = {name: getattr(selection, name) for name in TENSOR_FIELDS}
            return {n: v for n, v in values.items() if v is not None}, [check.failed for check in checks]

        signals = {key: torch.stack([image.signals[key] for image in images]) for key in images[0].signals}
        features = torch.stack([image.features for image in images]) if reads_features else None
        numbers = torch.arange(len(images))  # defines the number of images if the strategy reads the layout only
        in_dims = (0, 0 if reads_features else None, 0)
        # An error for random numbers: each image gets its own, so the images are reduced one after another.
        tensors, failures = torch.vmap(reduce_image, in_dims=in_dims, randomness="error")(signals, features, numbers)
        values = {name: value.unbind() for name, value in tensors.items()}
        selection, counts, messages = template[0]
        rebuilt = [
            _rebuild(selection, {name: parts[number] for name, parts in values.items()}, counts, image)
            for number, image in enumerate(images)
        ]
        return rebuilt, [DeferredCheck(failed, message) for failed, message in zip(failures, messages, strict=True)]


def _refuse_features() -> Tensor:
    raise _FeaturesReadError


def _rebuild(
    template: Selection, tensors: Mapping[str, Tensor], counts: Mapping[str, int | None], image: EncodedImage
) -> Selection:
    """Return the selection of one image of a group from the results of the vectorized call.

    Args:
        template: the selection inside the vectorized call.
        tensors: the tensors of the image by field.
        counts: number of true entries of each mask by field; None if the mask must be counted.
        image: the image.
    """
    mask_counts = tuple(MaskCount.of(tensors[name], number) for name, number in counts.items() if number is not None)
    changes: dict[str, Any] = {**tensors, "counts": mask_counts, "pixels": image.pixels}
    return replace(template, **changes)


def group_images(images: Iterable[EncodedImage]) -> list[list[EncodedImage]]:
    """Return the images in groups of one layout, with signals of the same kinds, layers and shapes.

    Args:
        images: the encoded images.
    """
    groups: dict[Hashable, list[EncodedImage]] = {}
    for image in images:
        groups.setdefault(group_key(image), []).append(image)
    return list(groups.values())


def group_key(image: EncodedImage) -> Hashable:
    """Return a key that is equal for images of one layout with signals of the same kinds, layers and shapes.

    Args:
        image: the encoded image.
    """
    shapes = tuple(sorted((key, tuple(value.shape), str(value.dtype)) for key, value in image.signals.items()))
    return image.geometry.original, shapes, tuple(sorted(image.depths.items())), image.device


def is_invalid(selection: Selection, count: int | None) -> Tensor:
    """Return whether a selection has NaN scores, keeps tokens that are not valid, or a wrong number, bool `[]`.

    A compiled graph has no other checks of a strategy (`raise_if`).

    Args:
        selection: the selection.
        count: the expected number of kept tokens; None accepts all numbers.
    """
    kept, layout = selection.kept, selection.geometry.to(selection.kept.device)
    failed = (kept & ~layout.valid).any()
    failed = failed if selection.scores is None else failed | selection.scores.isnan().any()
    return failed if count is None else failed | (kept.sum() != count)
