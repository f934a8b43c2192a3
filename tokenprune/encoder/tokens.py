"""The visual tokens of images whose patches were dropped or merged inside the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.image import EncodedImage
from tokenprune.packing import with_counts
from tokenprune.selection import Newlines, Selection, kept_newlines


def select_remaining(
    images: Sequence[EncodedImage], kept: Sequence[Tensor] | None, newlines: Newlines
) -> list[Selection]:
    """Return the selection of all tokens that the vision tower kept, for each image.

    Args:
        images: the encoded images.
        kept: the tokens of each image whose patches remain, bool `[tiles, tokens]`; None if all remain.
        newlines: as in `TokenReducer`.
    """
    if kept is None:
        return [Selection.all_tokens(image.geometry, image.pixels) for image in images]
    selections = []
    for image, mask in zip(images, kept, strict=True):
        geometry = image.geometry
        remaining = mask & geometry.to(mask.device).valid
        newline_mask = kept_newlines(geometry, remaining, newlines)
        selections.append(
            Selection(geometry, remaining, geometry.valid_tokens, newline_mask=newline_mask, pixels=image.pixels)
        )
    return selections


def restrict_images(images: Sequence[EncodedImage], kept: Sequence[Tensor]) -> list[EncodedImage]:
    """Return the images whose layouts contain only the tokens that the vision tower kept.

    Layouts are on the CPU: the masks of all images are read from the device at once.

    Args:
        images: the encoded images.
        kept: the tokens of each image whose patches remain, bool `[tiles, tokens]`.
    """
    masks = dict(zip(images, kept, strict=True))  # an image occurs several times for several questions
    flat = torch.cat([mask.flatten() for mask in masks.values()]).cpu()
    parts = flat.split([mask.numel() for mask in masks.values()])
    restricted = {
        image: replace(image, geometry=image.geometry.restrict_tokens(mask))
        for image, mask in zip(masks, parts, strict=True)
    }
    return [restricted[image] for image in images]


def widen_selections(
    selections: Sequence[Selection], images: Sequence[EncodedImage], newlines: Newlines
) -> list[Selection]:
    """Return selections among the tokens that the tower kept as selections among all tokens of each image.

    Args:
        selections: the selections in the layouts of `restrict_images`.
        images: the encoded images with their full layouts.
        newlines: as in `TokenReducer`.
    """
    widened = []
    for selection, image in zip(selections, images, strict=True):
        newline_mask = kept_newlines(image.geometry, selection.kept, newlines)
        wide = replace(selection, geometry=image.geometry, newline_mask=newline_mask)
        tokens, count = selection.token_count, selection.newline_count
        if newlines != "keep_rows" and tokens is not None and count is not None:
            wide = with_counts(wide, tokens, count)  # both layouts have all newline tokens
        widened.append(wide)
    return widened
