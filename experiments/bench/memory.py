"""Measures resident memory while many images pass through a model inside one block with an attached strategy.

Run it: ``python -m tokenprune.experiments.bench.memory --images 10000``

The model has LLaVA-NeXT's layout (5 tiles of 576 tokens) and random weights of width 8, so that only the record grows.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from tokenprune.adapter import find_adapter
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import HiRED, PruMerge, VisionZip

SIDE, PATCH, PLACEHOLDER = 336, 14, 127


def build_narrow_model() -> Any:
    """Return a LLaVA-NeXT of width 8 with five tiles of 576 tokens."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**small, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(**small, num_key_value_heads=1, vocab_size=128, max_position_embeddings=8192),
        image_token_index=PLACEHOLDER,
        image_grid_pinpoints=[[2 * SIDE, 2 * SIDE]],
    )
    return LlavaNextForConditionalGeneration(config).eval()


def read_resident_megabytes() -> float:
    """Return the resident memory of this process in MB (Linux).

    Raises:
        OSError: on systems without ``/proc``.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def measure_resident_memory(reducer: TokenReducer, images: int, interval: int) -> list[tuple[int, float]]:
    """Return the resident memory at regular intervals of one block, as (images, MB).

    Args:
        reducer: the strategy.
        images: number of images that pass through the model.
        interval: number of images between two readings.
    """
    model = build_narrow_model()
    pixels, sizes = torch.randn(1, 5, 3, SIDE, SIDE), torch.tensor([[2 * SIDE, 2 * SIDE]])
    layout = find_adapter(model).layouts({"pixel_values": pixels, "image_sizes": sizes})[0]
    ids = torch.tensor([[1] + [PLACEHOLDER] * len(layout.packed) + [9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}
    readings = []
    with torch.inference_mode(), reducer(model) as run:
        for number in range(1, images + 1):
            model(**inputs, logits_to_keep=1)
            if number % interval == 0:
                gc.collect()
                readings.append((number, read_resident_megabytes()))
    if run.account.image_count != images:
        raise RuntimeError(f"{run.account.image_count} of {images} images were recorded")
    return readings


def main(argv: Sequence[str] | None = None) -> int:
    """Measure three strategies, print their readings, and return the exit code."""
    parser = ArgumentParser(prog="python -m tokenprune.experiments.bench.memory", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="number of images in one block")
    parser.add_argument("--every", type=int, default=1000, help="number of images between two readings")
    config = parser.parse_args(argv)
    for reducer in (HiRED(0.2), VisionZip(0.2), PruMerge(0.2)):
        readings = measure_resident_memory(reducer, config.images, config.every)
        print(
            f"{reducer.label}: " + ", ".join(f"{count} images {megabytes:.0f} MB" for count, megabytes in readings),
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
