"""Configurations and sizes of the tiny models with random weights that adapters build for checks without a hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

EXAMPLE_PAD, EXAMPLE_IMAGE, EXAMPLE_TILE = 0, 3, 56
"""Padding id, placeholder id and side of a tile in pixels of example models."""
EXAMPLE_TEXT = (5, 6, 7)
"""Ids of text after each image of example inputs."""


def example_tower(**overrides: Any) -> dict[str, Any]:
    """Return the configuration of a tiny ViT (4 x 4 patches a tile).

    Args:
        overrides: further or different configuration entries.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return {**sizes, "image_size": EXAMPLE_TILE, "patch_size": 14, **overrides}


def example_decoder(**overrides: Any) -> dict[str, Any]:
    """Return the configuration of a tiny decoder.

    Args:
        overrides: further or different configuration entries.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "vocab_size": 64, "pad_token_id": EXAMPLE_PAD, **overrides}


def example_parts() -> dict[str, Any]:
    """Return the configuration of a tiny CLIP tower and a tiny Llama, for example models."""
    vision = CLIPVisionConfig(**example_tower())
    return {"vision_config": vision, "text_config": example_llm(), "image_token_index": EXAMPLE_IMAGE}


def example_siglip(**overrides: Any) -> SiglipVisionConfig:
    """Return the configuration of a tiny SigLIP tower for example models.

    Args:
        overrides: further or different configuration entries.
    """
    return SiglipVisionConfig(**example_tower(vision_use_head=False, **overrides))


def example_llm() -> LlamaConfig:
    """Return the configuration of a tiny Llama for example models."""
    return LlamaConfig(**example_decoder())


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


def pixel_generator(size: tuple[int, int]) -> torch.Generator:
    """Return a random generator for the pixels of an example image."""
    return torch.Generator().manual_seed(10_000 * size[0] + size[1])
