"""Builds the image processor of a model family from a model config, for models without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers


def _side(config: Any) -> int:
    size = config.vision_config.image_size
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _shortest(config: Any) -> dict[str, int]:
    return {"shortest_edge": _side(config)}


def _square(config: Any) -> dict[str, int]:
    return {"height": _side(config), "width": _side(config)}


def _build_qwen_processor(config: Any) -> Any:
    vision = config.vision_config
    return transformers.Qwen2VLImageProcessor(
        size={"shortest_edge": 56 * 56, "longest_edge": 3584 * 3584},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )


PROCESSORS: Mapping[str, Callable[[Any], Any]] = {
    "llava": lambda config: transformers.CLIPImageProcessor(size=_shortest(config), crop_size=_square(config)),
    "llava_next": lambda config: transformers.LlavaNextImageProcessor(
        size=_shortest(config), crop_size=_square(config), image_grid_pinpoints=config.image_grid_pinpoints
    ),
    "llava_onevision": lambda config: transformers.LlavaOnevisionImageProcessor(
        size=_square(config), image_grid_pinpoints=config.image_grid_pinpoints
    ),
    "internvl": lambda config: transformers.GotOcr2ImageProcessor(
        size=_square(config), crop_to_patches=True, min_patches=1, max_patches=12
    ),
    "qwen2_vl": _build_qwen_processor,
    "qwen2_5_vl": _build_qwen_processor,
}
"""Builds the image processor of a family, with the settings of its published checkpoints, from a model config."""
LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Vision towers of `llava` whose images CLIP's processor prepares."""


def build_image_processor(config: Any) -> Any:
    """Return the image processor of a model family, built from the model config without a checkpoint.

    Raises:
        ValueError: if the family is not supported.
    """
    family, tower = config.model_type, config.vision_config.model_type
    if family not in PROCESSORS or (family == "llava" and tower not in LLAVA_TOWERS):
        raise ValueError(
            f"images for a {family} ({tower}) with random weights cannot be prepared without its processor; give a "
            f"checkpoint folder, or one of {', '.join(PROCESSORS)}"
        )
    return PROCESSORS[family](config)
