"""Records, summaries and selections in the form that W&B shows: names, table entries, images with masks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tokenprune.selection import Selection

STEP = "eval/tokens_kept"
"""The x-axis of all results: the number of kept tokens determines the cost of a method."""
TIMES = ("encode_ms", "select_ms", "generate_ms")
CLASSES = {1: "kept", 2: "dropped", 3: "padding"}
"""Classes of the mask of an image; class 0 is the space between tiles."""
GAP = 8
"""Space between tiles, in pixels."""


def flatten_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a summary by their names in wandb, `eval/...` and `perf/...`.

    Args:
        summary: results. Nested mappings become paths; names that start with `eval/` or `perf/` do not change.
    """
    flat: dict[str, Any] = {}

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}/", value)
            else:
                flat[f"{prefix}{key}"] = value

    walk("", summary)
    return {_wandb_key(key): value for key, value in flat.items()}


def summarize_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean score, number of errors, mean kept tokens and median times in milliseconds of records.

    Args:
        records: the records; a record with an error is counted only as an error.
    """
    valid = [record for record in records if not record.get("error")]

    def column(key: str) -> list[float]:
        return [record[key] for record in valid if is_number(record.get(key))]

    results: dict[str, Any] = (
        {"eval/samples": len(records), "eval/errors": len(records) - len(valid)} if records else {}
    )
    means = {"eval/score": "score", STEP: "kept"}
    results |= {name: fmean(values) for name, key in means.items() if (values := column(key))}
    return results | {f"perf/{key}": median(values) for key in TIMES if (values := column(key))}


def image_and_mask(selection: Selection) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return one image of all tiles, with the base tile on the left and the sub-images in their grid, and its mask.

    Args:
        selection: the selection, with pixels.

    Returns:
        Pixels `[height, width, 3]` and the class of each pixel `[height, width]`, see `CLASSES`.

    Raises:
        ValueError: if the selection has no pixels.
    """
    if selection.pixels is None:
        raise ValueError("this selection has no pixels")
    tiles = selection.pixels.cpu().numpy()
    height, width = tiles.shape[1:3]
    rows, cols = selection.geometry.tile_grid
    token_rows, token_cols = selection.geometry.token_grid
    total_width = width + (2 * GAP + cols * (width + GAP) if rows else 0)
    total_height = max(rows, 1) * (height + GAP) - GAP
    pixels = np.full((total_height, total_width, 3), 255, dtype=np.uint8)
    mask = np.zeros((total_height, total_width), dtype=np.uint8)
    kept, valid = selection.kept.cpu().numpy(), selection.geometry.valid.cpu().numpy()
    token_row, token_col = np.arange(height) * token_rows // height, np.arange(width) * token_cols // width
    for number, tile in enumerate(tiles):
        row, col = divmod(number - 1, cols) if number else (0, 0)
        top = row * (height + GAP)
        left = width + 3 * GAP + col * (width + GAP) if number else 0
        classes = np.where(valid[number], np.where(kept[number], 1, 2), 3).reshape(token_rows, token_cols)
        pixels[top : top + height, left : left + width] = tile
        mask[top : top + height, left : left + width] = classes[token_row][:, token_col]
    return pixels, mask


def _wandb_key(key: str) -> str:
    """Return the name in wandb of a key of a summary."""
    if key.startswith(("eval/", "perf/")):
        return key
    if key in ("kept", "tokens_kept", "mean_kept"):
        return STEP
    cost = re.search(r"(_ms|_s|_mb|_gb|_bytes|_flops|_per_second|throughput|memory|speedup)$", key)
    return f"{'perf' if cost else 'eval'}/{key}"


def to_cell(value: Any) -> Any:
    """Return a value that a wandb table can hold; lists become text.

    Args:
        value: any value of a record or a summary.
    """
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def is_number(value: Any) -> bool:
    """Return whether a value is a number that W&B can plot; booleans are not.

    Args:
        value: any value of a record or a summary.
    """
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def to_path_name(name: str) -> str:
    """Return a name as one component of a path.

    Args:
        name: any text.
    """
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "selection"
