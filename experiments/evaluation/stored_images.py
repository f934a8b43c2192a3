"""What shows a selection again without model and data: kept tokens in the record, tiles in the run directory.

Disk is bounded: so many images of a run (`IMAGES`, the option ``--images``), each as its tiles of at most `SIDE`
and together `PIXELS` pixels. Only records of these images hold kept tokens, about 400 letters each for the 2,880
tokens of LLaVA-NeXT. An image is written whole before the first record that names it, so a kill leaves no record
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
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenprune.adapter import Adapter, Encoding
from tokenprune.experiments.evaluation.records import write_whole
from tokenprune.image import TileGeometry
from tokenprune.selection import Selection

FOLDER = "images"
"""Folder of the images in a run directory."""
IMAGES = 200
"""So many images of a model and task are stored unless something else is asked for."""
SIDE, PIXELS, BYTES = 240, 1 << 20, 150_000
"""Largest side of a stored tile, pixels of all tiles of an image, and bytes of a PNG file; larger ones are JPEG."""


def is_stored(number: int, total: int, most: int) -> bool:
    """Whether an image is one of those that are stored: evenly spread, whoever encodes them and in whatever order.

    Args:
        number: number of the image in its task.
        total: images of the task.
        most: how many are stored.
    """
    return number * most // total != (number - 1) * most // total if most < total else True


def image_name(model: str, task: Any, group: str) -> str:
    """Return the name of the file of an image, which the settings of a run directory share.

    Args:
        model: the model, on which the tiles depend.
        task: configuration of the task.
        group: name of the image in its task.
    """
    key = json.dumps([model, task, group], sort_keys=True)
    return f"{FOLDER}/{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def with_pixels(encoding: Encoding, adapter: Adapter, inputs: Mapping[str, Any]) -> Encoding:
    """Return an encoding whose images carry their pixels, where the adapter can tell them without encoding again.

    Args:
        encoding: the encoded images.
        adapter: what made it.
        inputs: the model inputs that it was made of.
    """
    try:
        bare = adapter.unencoded(inputs, len(encoding.images)).images
    except NotImplementedError:
        return encoding
    images = [replace(one, pixels=other.pixels) for one, other in zip(encoding.images, bare, strict=True)]
    return replace(encoding, images=images)


def store(out: Path, name: str, pixels: Tensor) -> str:
    """Write the tiles of an image, one below the other; return the path in the run directory.

    A file of the same content stays. One of other content belongs to discarded records of a changed image, and is
    replaced.

    Args:
        out: the run directory.
        name: name of the file without its end.
        pixels: uint8 `[tiles, height, width, 3]`.
    """
    tiles, height, width, _ = pixels.shape
    scale = min(1.0, SIDE / max(height, width), math.sqrt(PIXELS / (tiles * height * width)))
    size = max(1, int(width * scale)), max(1, int(height * scale))
    strip = Image.new("RGB", (size[0], tiles * size[1]))
    for number, tile in enumerate(pixels.cpu().numpy()):
        strip.paste(Image.fromarray(tile).resize(size, Image.Resampling.LANCZOS), (0, number * size[1]))
    end, content = ".png", _file(strip, "PNG", optimize=True)
    if len(content) > BYTES:
        end, content = ".jpg", _file(strip, "JPEG", quality=85, subsampling=0)
    (out / FOLDER).mkdir(exist_ok=True)
    path, other = out / f"{name}{end}", out / f"{name}{'.jpg' if end == '.png' else '.png'}"
    if not path.is_file() or path.read_bytes() != content:
        write_whole(path, content)
    other.unlink(missing_ok=True)
    return f"{name}{end}"


def _file(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pack(mask: Tensor) -> str:
    """Return a mask as text: its bits, compressed.

    Args:
        mask: bool, of any shape.
    """
    return base64.b64encode(zlib.compress(np.packbits(mask.cpu().numpy()).tobytes(), 9)).decode()


def unpack(text: str, shape: tuple[int, ...]) -> Tensor:
    """Return the mask that `pack` wrote.

    Args:
        text: the text.
        shape: its shape.
    """
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).astype(bool)).view(shape)


def in_record(selection: Selection) -> dict[str, Any]:
    """Return what a record holds of a selection: its layout, and which tokens are valid and kept.

    Args:
        selection: the selection.
    """
    layout = selection.geometry
    return {
        "tile_grid": list(layout.tile_grid),
        "token_grid": list(layout.token_grid),
        "valid": pack(layout.valid),
        "kept": pack(selection.kept),
    }


def from_record(out: Path, record: Mapping[str, Any]) -> Selection | None:
    """Return the selection of a record with its pixels, ready to be drawn; None if they were not stored.

    Args:
        out: the run directory.
        record: the record.
    """
    said, name = record.get("selection"), record.get("stored_image")
    if not said or not name or not (out / name).is_file():
        return None
    (rows, cols), (height, width) = said["tile_grid"], said["token_grid"]
    shape = 1 + rows * cols, height * width
    valid = unpack(said["valid"], shape)
    packed = valid.flatten().nonzero()[:, 0]
    geometry = TileGeometry((rows, cols), (height, width), torch.zeros(rows * cols, 4), packed)
    with Image.open(out / name) as image:
        strip = torch.from_numpy(np.array(image.convert("RGB")))
    pixels = strip.view(shape[0], strip.shape[0] // shape[0], strip.shape[1], 3)
    return Selection(geometry, unpack(said["kept"], shape), asked=record["asked"], pixels=pixels)
