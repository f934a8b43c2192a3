"""Reads the images that users have: any mode, any orientation, refused by name where nothing can be made of them."""

from __future__ import annotations

import io
import os
import re
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

NOT_FETCHED = "{} is an address, and addresses are not fetched; download the image first, and give its file"
"""What is wrong with an address in place of a file."""


def is_address(path: str) -> bool:
    """Return whether a text is an address such as ``https://...`` and not a file.

    Args:
        path: the text as the user wrote it; `Path` removes one slash.
    """
    return re.match(r"https?:/|[a-z][a-z\d+.-]+://", path.lower()) is not None


def load_image(path: str | Path) -> Image.Image:
    """Return an image file as RGB, upright.

    EXIF rotation is applied, transparency is laid on white, 16-bit and float pixels are scaled to 8 bits, animations
    give their first frame.

    Args:
        path: the file.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if is_address(str(path)):
        raise ValueError(NOT_FETCHED.format(path))
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give the file of an image")
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return to_rgb(upright)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that Pillow can read; convert it to PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too large to be read safely ({error}); scale it down first") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: broken or cut off ({error}); write it anew") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB; transparency becomes white.

    Args:
        image: the image.
    """
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits: Pillow would clip instead of scale
        values = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16"):
            low, high = 0.0, 65535.0
        else:
            finite = values[np.isfinite(values)]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
            low, high = (0.0, max(high, 255.0 if high <= 255 else 65535.0)) if low >= 0 and high > 1 else (low, high)
        scaled = np.nan_to_num((values - low) / (high - low if high > low else 1.0)).clip(0, 1)
        return Image.fromarray((scaled * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all.

    Args:
        image: the image.
        path: the file; its folder is made if it is missing.

    Raises:
        OSError: if the folder cannot be written or the disk is full; no partial file stays.
    """
    data = io.BytesIO()
    image.save(data, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data.getvalue())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
