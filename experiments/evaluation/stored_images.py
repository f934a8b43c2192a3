"""Stores images and kept-token masks, so that reports can redraw a selection without the model or the data.

The tiles of an image are stored in the run directory, the mask of kept tokens in the record. Disk use is bounded: the
option ``--images`` (by default `IMAGES`) limits the images of a run, `SIDE` the sides of a tile and `PIXELS` the pixels
of an image. Only records of these images hold kept tokens, about 400 characters each for the 2,880 tokens of
LLaVA-NeXT. An image is written completely before the first record that names it, so a killed run leaves no record
without its image.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenprune.adapter import Adapter, Encoding
from tokenprune.capabilities import Resizable
from tokenprune.experiments.evaluation.records import write_atomically
from tokenprune.geometry import TileGeometry
from tokenprune.selection import Selection

FOLDER = "images"
"""Folder of the images in a run directory."""
IMAGES = 200
"""Number of images of a model and task that are stored by default."""
SIDE, PIXELS, BYTES = 240, 1 << 20, 150_000
"""Largest side of a stored tile, pixels of all tiles of an image, and bytes of a PNG file; larger files become JPEG."""


def is_stored(number: int, total: int, most: int) -> bool:
    """Return whether an image is stored. Stored images are evenly spread over the task and depend on no run order.

    Args:
        number: index of the image in its task.
        total: number of images of the task.
        most: number of images to store.
    """
    return number * most // total != (number - 1) * most // total if most < total else True


def image_name(model: str, task: Any, group: str) -> str:
    """Return the file name of an image without its suffix; the settings of a run directory share the file.

    Args:
        model: the model, since the tiles depend on it.
        task: configuration of the task.
        group: name of the image in its task.
    """
    key = json.dumps([model, task, group], sort_keys=True)
    return f"{FOLDER}/{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def add_pixels(encoding: Encoding, adapter: Adapter, inputs: Mapping[str, Any]) -> Encoding:
    """Return an encoding whose images carry their pixels, if the adapter can read them without encoding again.

    Args:
        encoding: the encoded images.
        adapter: the adapter that encoded them.
        inputs: the model inputs of the encoding.
    """
    if not isinstance(adapter, Resizable):
        return encoding
    bare = adapter.build_unencoded(inputs, len(encoding.images)).images
    images = [replace(image, pixels=source.pixels) for image, source in zip(encoding.images, bare, strict=True)]
    return replace(encoding, images=images)


def store_image(out: Path, name: str, pixels: Tensor) -> str:
    """Write the tiles of an image as one vertical strip, and return its path in the run directory.

    A file with equal content is not written again. A file with different content belongs to deleted records of a
    changed image, and is replaced.

    Args:
        out: the run directory.
        name: name of the file without its suffix.
        pixels: uint8 `[tiles, height, width, 3]`.
    """
    tiles, height, width, _ = pixels.shape
    scale = min(1.0, SIDE / max(height, width), math.sqrt(PIXELS / (tiles * height * width)))
    size = max(1, int(width * scale)), max(1, int(height * scale))
    strip = Image.new("RGB", (size[0], tiles * size[1]))
    for number, tile in enumerate(pixels.cpu().numpy()):
        strip.paste(Image.fromarray(tile).resize(size, Image.Resampling.LANCZOS), (0, number * size[1]))
    suffix, content = ".png", _encode_image(strip, "PNG", optimize=True)
    if len(content) > BYTES:
        suffix, content = ".jpg", _encode_image(strip, "JPEG", quality=85, subsampling=0)
    (out / FOLDER).mkdir(exist_ok=True)
    path, stale = out / f"{name}{suffix}", out / f"{name}{'.jpg' if suffix == '.png' else '.png'}"
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)
    stale.unlink(missing_ok=True)
    return f"{name}{suffix}"


def _encode_image(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def pack_mask(mask: Tensor) -> str:
    """Return a mask as text: its bits, compressed with zlib, in Base64.

    Args:
        mask: bool, of any shape.
    """
    return base64.b64encode(zlib.compress(np.packbits(mask.cpu().numpy()).tobytes(), 9)).decode()


def unpack_mask(text: str, shape: tuple[int, ...]) -> Tensor:
    """Return the bool mask of a text from `pack_mask`.

    Args:
        text: the text.
        shape: shape of the mask.
    """
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).astype(bool)).view(shape)


def selection_to_record(selection: Selection, cuts: Mapping[int, Selection] = MappingProxyType({})) -> dict[str, Any]:
    """Return a selection as plain data for a record: tile grid, token grid, and masks of valid and kept tokens.

    Args:
        selection: the selection of the tokens that entered the LLM.
        cuts: the selections at the cuts inside the LLM, by layer.
    """
    layout = selection.geometry
    return {
        "tile_grid": list(layout.tile_grid),
        "token_grid": list(layout.token_grid),
        "valid": pack_mask(layout.valid),
        "kept": pack_mask(selection.kept),
        "cuts": [{"layer": layer, "kept": pack_mask(cut.kept)} for layer, cut in cuts.items()],
    }


def selection_from_record(out: Path, record: Mapping[str, Any]) -> Selection | None:
    """Return the selection of a record with its pixels; None if its image was not stored.

    Args:
        out: the run directory.
        record: the record.
    """
    entry, name = record.get("selection"), record.get("stored_image")
    if not entry or not name or not (out / name).is_file():
        return None
    (rows, cols), (height, width) = entry["tile_grid"], entry["token_grid"]
    shape = 1 + rows * cols, height * width
    valid = unpack_mask(entry["valid"], shape)
    packed = valid.flatten().nonzero()[:, 0]
    geometry = TileGeometry((rows, cols), (height, width), torch.zeros(rows * cols, 4), packed)
    with Image.open(out / name) as image:
        strip = torch.from_numpy(np.array(image.convert("RGB")))
    pixels = strip.view(shape[0], strip.shape[0] // shape[0], strip.shape[1], 3)
    return Selection(geometry, unpack_mask(entry["kept"], shape), asked=record["asked"], pixels=pixels)


def cuts_from_record(record: Mapping[str, Any], selection: Selection) -> dict[int, Selection]:
    """Return the selections at the cuts inside the LLM of a record, by layer.

    Args:
        record: the record.
        selection: the result of `selection_from_record`.
    """
    cuts: dict[int, Selection] = {}
    layout, kept = selection.geometry, selection.kept
    for number, entry in enumerate(record["selection"].get("cuts", ())):
        layout = layout.restrict(kept.flatten()[layout.packed])
        kept = unpack_mask(entry["kept"], tuple(selection.kept.shape))
        cuts[entry["layer"]] = Selection(layout, kept, asked=record["cuts"][number]["asked"])
    return cuts
