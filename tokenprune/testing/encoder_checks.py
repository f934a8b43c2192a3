"""Conformance checks of strategies inside the vision tower; they call `EncoderReducer.group` on synthetic tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.budget import parse_amount
from tokenprune.encoder.patches import PatchGroups
from tokenprune.encoder_reducer import EncoderReducer, count_patches
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.selection import Selection
from tokenprune.testing.check_errors import CheckError


def find_tile_layout(layout: TileGeometry) -> TileGeometry:
    """Return the layout that `group` reads for the tiles of an image: each tile is one row of patches without padding.

    Args:
        layout: the layout of the image.
    """
    tiles, patches = layout.tiles, layout.tokens
    grid = (1, tiles - 1) if tiles > 1 else (0, 0)
    return TileGeometry(grid, (1, patches), torch.zeros(tiles - 1, 4), torch.arange(tiles * patches))


def count_remaining(reducer: EncoderReducer, patches: int) -> int:
    """Return the number of patches of a tile that `group` keeps in a check; one step merges at most half of them.

    Args:
        reducer: the strategy.
        patches: number of patches of a tile.
    """
    number = count_patches(parse_amount(reducer.budget), patches)
    return max(number, patches - patches // 2) if reducer.merges else number


def select_patches(reducer: EncoderReducer, image: EncodedImage) -> Selection:
    """Return the patches that `group` keeps in one step, as a selection.

    Args:
        reducer: the strategy.
        image: tiles in a layout of `find_tile_layout`.
    """
    number = count_remaining(reducer, image.geometry.tokens)
    groups = reducer.group_checked(image, number)
    kept = torch.zeros(image.geometry.tiles, image.geometry.tokens, dtype=torch.bool)
    kept = kept.scatter(1, groups.kept, True)
    return Selection(image.geometry, kept, number * image.geometry.tiles, pixels=image.pixels)


def iterate_groups(
    reducer: EncoderReducer, images: Mapping[str, EncodedImage]
) -> Iterator[tuple[str, EncodedImage, int, PatchGroups]]:
    """Yield action, tiles, number of remaining patches and groups of several steps.

    Args:
        reducer: the strategy.
        images: tiles by the name of their layout.

    Raises:
        CheckError: if `group` raises.
    """
    for name, image in images.items():
        patches = image.geometry.tokens
        half = patches - patches // 2
        for number in (half, patches - 1) if reducer.merges else (1, half, patches - 1):
            action = f"{type(reducer).__name__}.group on {name} with {number} of {patches} patches"
            try:
                groups = reducer.group_checked(image, number)
            except Exception as error:
                message = " ".join(str(error).split())
                raise CheckError(f"{action}: expected PatchGroups, got {type(error).__name__}: {message}") from error
            yield action, image, number, groups


def check_patch_groups(reducer: EncoderReducer, images: Mapping[str, EncodedImage]) -> None:
    """Check types, values and weights of the groups: each kept patch is in its own group, and no patch is kept twice.

    Args:
        reducer: the strategy.
        images: tiles by the name of their layout.
    """
    for action, image, number, groups in iterate_groups(reducer, images):
        tiles, patches = image.geometry.tiles, image.geometry.tokens
        ranges: dict[str, tuple[Tensor, int, int]] = {"kept": (groups.kept, 0, patches)}
        if groups.group is not None:
            ranges["group"] = (groups.group, -1, number)
        for field, (value, low, high) in ranges.items():
            is_in_range = value.dtype == torch.int64 and bool(((value >= low) & (value < high)).all())
            if not is_in_range:
                raise CheckError(
                    f"{action}: expected {field} as int64 {list(value.shape)} from {low} to {high - 1}, got "
                    f"{value.dtype} from {value.min().item()} to {value.max().item()}"
                )
        if bool((groups.kept.sort(dim=1).values.diff(dim=1) == 0).any()):
            raise CheckError(f"{action}: expected kept with {number} different patches of each tile, got repeated ones")
        if groups.group is not None:
            numbers = torch.arange(number).expand(tiles, -1)
            if misplaced := int((groups.group.gather(1, groups.kept) != numbers).sum()):
                raise CheckError(
                    f"{action}: expected group[tile, kept[tile, n]] == n, so that a kept patch is in its own group, "
                    f"got {misplaced} kept patches in another group"
                )
        if groups.weights is not None and not bool(groups.weights.isfinite().all()):
            raise CheckError(f"{action}: expected finite weights [{tiles}, {patches}], got NaN or infinity")
        if not reducer.merges and groups.group is not None:
            raise CheckError(f"{action}: expected group=None, because merges is False, got groups")


def check_single_tiles(reducer: EncoderReducer, images: Mapping[str, EncodedImage]) -> None:
    """Check that each tile has the same groups in a call of its own.

    Args:
        reducer: the strategy.
        images: tiles by the name of their layout.
    """
    for action, image, number, groups in iterate_groups(reducer, images):
        for tile in range(image.geometry.tiles):
            signals = {key: value[tile : tile + 1] for key, value in image.signals.items()}
            layout = find_tile_layout(TileGeometry.single((1, image.geometry.tokens)))
            features = image.features[tile : tile + 1]
            single_image = replace(image.with_features(features), geometry=layout, signals=signals)
            single = reducer.group_checked(single_image, number)
            pairs = zip(groups, single, strict=True)
            is_equal = all(
                together is alone is None
                or (together is not None and alone is not None and torch.equal(together[tile : tile + 1], alone))
                for together, alone in pairs
            )
            if not is_equal:
                raise CheckError(
                    f"{action}: expected the same groups of tile {tile} in a call of its own, because each tile is "
                    "reduced on its own, got different groups"
                )


ENCODER_CHECKS: Mapping[str, Callable[[EncoderReducer, Mapping[str, EncodedImage]], None]] = {
    "patch groups": check_patch_groups,
    "single tiles": check_single_tiles,
}
"""The checks of a strategy inside the vision tower by name; they take the strategy and synthetic tiles."""
