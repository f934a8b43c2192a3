"""Reads image files of any mode and orientation as RGB, and raises errors that name files that cannot be read."""

from __future__ import annotations

import io
import os
import re
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

URL_ERROR = "{} is a URL, and URLs are not downloaded; download the image first, and pass its file"
"""Error text for a URL in place of a file."""


def is_url(path: str) -> bool:
    """Return whether a text is a URL such as ``https://...`` and not a file.

    Args:
        path: the text from the user, not converted to a `Path`, which removes a slash.
    """
    return re.match(r"https?:/|[a-z][a-z\d+.-]+://", path.lower()) is not None


def load_image(path: str | Path) -> Image.Image:
    """Return an image file as an upright RGB image.

    EXIF rotation is applied, transparency becomes white, and 16-bit and float pixels are scaled to 8 bits. Only the
    first frame of an animation is read.

    Args:
        path: the file.

    Raises:
        ValueError: if the file cannot be read as an image; the error names the file and the fault.
    """
    if is_url(str(path)):
        raise ValueError(URL_ERROR.format(path))
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; pass an image file")
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
        raise ValueError(f"{path}: broken or truncated ({error}); create the file again") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB; transparency becomes white."""
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
        foreground = image.convert("RGBA")
        background = Image.new("RGBA", foreground.size, "white")
        return Image.alpha_composite(background, foreground).convert("RGB")
    return image.convert("RGB")


def find_free_path(path: Path) -> Path:
    """Return the path if there is no such file, otherwise with the first free number: ``overlay-2.png``.

    Args:
        path: the file to write.
    """
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return path if not path.exists() else next(name for name in numbered if not name.exists())


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically.

    Args:
        image: the image.
        path: the file; a missing folder is created.

    Raises:
        OSError: if the folder cannot be written or the disk is full; no partial file remains.
    """
    data = io.BytesIO()
    image.save(data, format="PNG")
    write_file(data.getvalue(), path)


def write_file(data: bytes, path: Path) -> None:
    """Write a file atomically.

    Args:
        data: the content.
        path: the file; a missing folder is created.

    Raises:
        OSError: if the folder cannot be written or the disk is full; no partial file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
