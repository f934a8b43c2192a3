"""Configurations, sizes and token ids of example models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, PixtralVisionConfig, SiglipVisionConfig

EXAMPLE_PAD, EXAMPLE_IMAGE, EXAMPLE_TILE = 0, 3, 56
"""Padding id, placeholder id and side of a tile in pixels of example models."""
EXAMPLE_TEXT = (5, 6, 7)
"""Ids of text after each image of example inputs."""
EXAMPLE_TOKEN = 28
"""Side in pixels of the area of a visual token in example models with native resolution."""
EXAMPLE_GRIDS = [[rows * EXAMPLE_TILE, cols * EXAMPLE_TILE] for rows, cols in [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]]
"""Canvas sizes of example models in pixels: up to three tiles a side."""
MROPE_IDS: Mapping[str, Any] = {
    "image_token_id": EXAMPLE_IMAGE,
    "video_token_id": 4,
    "vision_start_token_id": 10,
    "vision_end_token_id": 11,
}
"""Special token ids in the configurations of example models with M-RoPE."""


def build_tower_config(**overrides: Any) -> dict[str, Any]:
    """Return the configuration of a tiny ViT (4 x 4 patches a tile).

    Args:
        overrides: further or different configuration entries.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return {**sizes, "image_size": EXAMPLE_TILE, "patch_size": 14, **overrides}


def build_siglip_config(**overrides: Any) -> SiglipVisionConfig:
    """Return the configuration of a tiny SigLIP tower without pooling head.

    Args:
        overrides: further or different configuration entries.
    """
    return SiglipVisionConfig(**build_tower_config(vision_use_head=False, **overrides))


def build_pixtral_config(patch_size: int) -> PixtralVisionConfig:
    """Return the configuration of a tiny Pixtral tower.

    Args:
        patch_size: side of a patch in pixels.
    """
    return PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8 * EXAMPLE_TOKEN,
        patch_size=patch_size,
    )


def build_decoder_config(**overrides: Any) -> dict[str, Any]:
    """Return the configuration of a tiny decoder.

    Args:
        overrides: further or different configuration entries.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "vocab_size": 64, "pad_token_id": EXAMPLE_PAD, **overrides}


def build_mrope_config(**overrides: Any) -> dict[str, Any]:
    """Return the configuration of a tiny decoder with M-RoPE.

    Args:
        overrides: further or different configuration entries.
    """
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tokens = {"bos_token_id": None, "eos_token_id": None}  # the defaults are outside of the tiny vocabulary
    return build_decoder_config(**{"num_key_value_heads": 2, "rope_parameters": rope, **tokens, **overrides})


def build_llama_config() -> LlamaConfig:
    """Return the configuration of a tiny Llama."""
    return LlamaConfig(**build_decoder_config())


def build_llava_config() -> dict[str, Any]:
    """Return the configuration entries of a tiny model of the LLaVA family: a CLIP tower and a Llama."""
    vision = CLIPVisionConfig(**build_tower_config())
    return {"vision_config": vision, "text_config": build_llama_config(), "image_token_index": EXAMPLE_IMAGE}


def with_sharp_attention(model: Any, tower: str = "vision_tower") -> Any:
    """Return the model with scaled queries and keys of its vision tower, so that attention is far from uniform.

    Near-uniform attention rows would hide mistakes.

    Args:
        model: a model with random weights.
        tower: part of the names of the tower's parameters.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if tower in name and ("q_proj.weight" in name or "k_proj.weight" in name):
                parameter.mul_(12.0)
            elif tower in name and name.endswith("qkv.weight"):
                parameter[: len(parameter) // 3 * 2].mul_(12.0)
    return model.eval()
