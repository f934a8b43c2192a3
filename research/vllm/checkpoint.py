"""Saves small checkpoints with random weights that transformers and vLLM both load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tokenprune.testing.families import FAMILIES
from tokenprune.testing.tiny_models import TEMPLATE, TILE

HEAD_SIZE = 64
"""Width of an attention head; kernels of vLLM support few widths."""
SCALES = {"embed_tokens": 50.0, "lm_head": 20.0, "language_model.layers": 4.0, "multi_modal_projector": 10.0}
"""Factors on weight matrices, with which greedy tokens depend on the image and do not repeat."""
TOWER, EARLIER_TOWER = "vision_tower.", "vision_tower.vision_model."
"""Prefix of tensors of a CLIP or SigLIP tower as saved, and as in checkpoints of earlier versions, which vLLM reads."""


def save_checkpoint(folder: Path, family: str = "llava_next", width: int = 256, layers: int = 2) -> None:
    """Save a model with random weights, and its processor.

    Args:
        folder: the folder of the checkpoint.
        family: name of the family in `FAMILIES`.
        width: hidden size of the LLM, a multiple of 128.
        layers: number of layers of the LLM.
    """
    config = copy.deepcopy(FAMILIES[family].model().config)
    save_model(folder, type(FAMILIES[family].model()), config, width, layers)
    processor = copy.deepcopy(FAMILIES[family].processor())
    processor.chat_template = TEMPLATE.replace("<image>", processor.image_token)
    processor.save_pretrained(folder)


def save_large_tiles(folder: Path, tile: int, width: int, layers: int) -> None:
    """Save a LLaVA-NeXT with larger tiles, for a benchmark.

    Args:
        folder: the folder of the checkpoint.
        tile: side of a tile in pixels, a multiple of 56. Images have up to four sub-images.
        width: hidden size of the LLM, a multiple of 128.
        layers: number of layers of the LLM.
    """
    family = FAMILIES["llava_next"]
    config, processor = copy.deepcopy(family.model().config), copy.deepcopy(family.processor())
    pinpoints = [[side * tile // TILE for side in sides] for sides in config.image_grid_pinpoints]
    config.vision_config.image_size, config.image_grid_pinpoints = tile, pinpoints
    images = processor.image_processor
    processor.image_processor = type(images)(
        size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, image_grid_pinpoints=pinpoints
    )
    save_model(folder, type(family.model()), config, width, layers)
    processor.save_pretrained(folder)


def save_model(folder: Path, model_class: Any, config: Any, width: int, layers: int) -> None:
    """Save a model with random weights and an LLM of another size.

    Args:
        folder: the folder of the checkpoint.
        model_class: the class of the model.
        config: its configuration; it is changed.
        width: hidden size of the LLM.
        layers: number of layers of the LLM.
    """
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "head_dim": HEAD_SIZE}
    heads = {"num_attention_heads": width // HEAD_SIZE, "num_key_value_heads": width // HEAD_SIZE // 2}
    config.get_text_config().update({**sizes, **heads, "max_position_embeddings": 8192})
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(next((scale for part, scale in SCALES.items() if part in name), 1.0))
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    is_earlier = any(f"{TOWER}embeddings.position_embedding." in key for key in tensors)  # CLIP and SigLIP
    if is_earlier:
        tensors = {key.replace(TOWER, EARLIER_TOWER): tensor for key, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
