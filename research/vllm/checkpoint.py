"""Builds small LLaVA-NeXT checkpoints with random weights that transformers and vLLM both load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessor

from tokenprune.testing.families import FAMILIES

HEAD_SIZE = 64
"""Width of an attention head; kernels of vLLM support few widths."""

SCALES = {"embed_tokens": 50.0, "lm_head": 20.0, "language_model.layers": 4.0, "multi_modal_projector": 10.0}
"""Factors on weight matrices, with which greedy tokens depend on the image and do not repeat."""


def save_checkpoint(folder: Path, width: int = 256, layers: int = 2, tile: int = 56) -> None:
    """Save a LLaVA-NeXT with random weights and its processor.

    Args:
        folder: the folder of the checkpoint.
        width: hidden size of the LLM, a multiple of 128.
        layers: number of layers of the LLM.
        tile: side of a tile in pixels, a multiple of 56. Images have up to four sub-images.
    """
    family = FAMILIES["llava_next"]
    config: Any = family.model().config
    config.text_config.update(
        {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // HEAD_SIZE,
            "num_key_value_heads": width // HEAD_SIZE // 2,
            "head_dim": HEAD_SIZE,
            "max_position_embeddings": 8192,
        }
    )
    config.vision_config.image_size = tile
    config.image_grid_pinpoints = [[tile * rows // 56, tile * cols // 56] for rows, cols in config.image_grid_pinpoints]
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(next((scale for part, scale in SCALES.items() if part in name), 1.0))
    model.save_pretrained(folder)
    processor = family.processor()
    square = {"height": tile, "width": tile}
    processor.image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": tile}, crop_size=square, image_grid_pinpoints=config.image_grid_pinpoints
    )
    processor.save_pretrained(folder)
    rename_tower(folder / "model.safetensors")


def rename_tower(file: Path) -> None:
    """Rename the tensors of the vision tower as in checkpoints of earlier versions, the names that vLLM reads."""
    tensors = load_file(file)
    prefix, old_prefix = "vision_tower.", "vision_tower.vision_model."
    save_file({key.replace(prefix, old_prefix): tensor for key, tensor in tensors.items()}, file, {"format": "pt"})
