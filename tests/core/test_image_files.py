"""Loading and saving of images: color modes, rotation, broken files and write errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenprune.image_files import load_image, save_image, to_rgb

RAMP = np.linspace(0, 255, 40 * 30).reshape(40, 30)
GRAY = Image.fromarray(RAMP.astype(np.uint8))
COLOR = Image.merge("RGB", [GRAY, GRAY.rotate(180), GRAY.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])


def is_close(image: Image.Image, expected: Image.Image, tolerance: float = 1.0) -> bool:
    """Return whether all pixels of an RGB image differ from the expected pixels by at most `tolerance`."""
    assert image.mode == "RGB"
    assert image.size == expected.size
    return float(np.abs(np.asarray(image, float) - np.asarray(expected.convert("RGB"), float)).max()) <= tolerance


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (COLOR, COLOR),
        (GRAY, GRAY),
        (COLOR.convert("CMYK"), COLOR),
        (COLOR.convert("P"), COLOR.convert("P").convert("RGB")),
        (GRAY.convert("1"), GRAY.convert("1").convert("RGB")),
        (COLOR.convert("RGBA"), COLOR),
        (GRAY.convert("LA"), GRAY),
        (Image.fromarray((RAMP * 257).astype(np.uint16)), GRAY),
        (Image.fromarray((RAMP / 255).astype(np.float32)), GRAY),
        (Image.fromarray(RAMP.astype(np.float32)), GRAY),
        (Image.fromarray(RAMP.astype(np.int32)), GRAY),
        (Image.fromarray((RAMP * 257).astype(np.int32)), GRAY),
    ],
    ids=lambda image: image.mode,
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: Image.Image) -> None:
    assert is_close(to_rgb(image), expected)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    clear.putpixel((1, 2), (200, 0, 0, 255))
    rgb = to_rgb(clear)
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((1, 2)) == (200, 0, 0)
    palette = GRAY.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_non_finite_pixels_do_not_change_the_range() -> None:
    values = RAMP.astype(np.float32)
    values[0, 0], values[0, 1] = np.nan, np.inf
    assert to_rgb(Image.fromarray(values)).getpixel((29, 39)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = COLOR.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    COLOR.save(tmp_path / "photo.png", exif=exif)
    assert is_close(load_image(tmp_path / "photo.png"), COLOR.transpose(Image.Transpose.ROTATE_270))


def test_the_first_frame_of_an_animation_is_loaded(tmp_path: Path) -> None:
    black, white = Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 255)
    black.save(tmp_path / "a.gif", save_all=True, append_images=[white])
    assert load_image(tmp_path / "a.gif").getpixel((3, 3)) == (0, 0, 0)


def test_errors_for_unreadable_files_name_the_path(tmp_path: Path) -> None:
    COLOR.resize((300, 300)).save(tmp_path / "complete.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "complete.png").read_bytes()[:300])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, message in {
        "truncated.png": "broken or truncated",
        "notes.txt": "not an image",
        "empty.jpg": "not an image",
        "missing.png": "no such file",
        ".": "is a folder",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    COLOR.resize((300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png: too large to be read safely"):
        load_image(tmp_path / "bomb.png")


def test_a_full_disk_keeps_the_previous_image_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new" / "overlay.png"
    save_image(COLOR, target)
    before = target.read_bytes()

    def raise_disk_full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_image(GRAY, target)
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["overlay.png"]
