"""Converts the pixels that a model receives to images, for overlays and saliency models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor


def to_uint8_images(pixels: Tensor) -> Tensor:
    """Return normalized pixels as images, uint8 `[tiles, height, width, 3]` on the CPU.

    The values are stretched to the full range, because mean and deviation of the processor are not available here.

    Args:
        pixels: the tiles of an image as the processor returns them, `[tiles, 3, height, width]`.
    """
    pixels = pixels.detach().float()
    low, high = pixels.min(), pixels.max()
    scaled = (pixels - low) / (high - low).clamp(min=1e-6) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def read_pixel_mean_std(model: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of the colors, read from the configuration of the image processor.

    Args:
        model: the model; its folder or hub id (`name_or_path`) has the configuration.

    Raises:
        ValueError: if the configuration is missing or cannot be read.
    """
    name = getattr(model, "name_or_path", "")
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"cannot read the image normalization of {type(model).__name__} from {name!r} "
            f"({' '.join(str(error).split())[:200]}); pass image_mean and image_std of its image processor"
        ) from error
    if not getattr(processor, "do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return processor.image_mean, processor.image_std
