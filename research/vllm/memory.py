"""Measures the memory of `VisionEncoder` and compares it with the size of the complete LLaVA-NeXT-7B.

Run it: ``python -m research.vllm.memory``

The checkpoint has the config of LLaVA-NeXT-7B. Tensors of the vision side are random. The files of the LLM are sparse,
so that the checkpoint takes 0.7 GB of the disk; the encoder does not open them. The peak is measured in a new process,
and the memory after importing the libraries is reported separately. ``--whole`` also loads the complete model, which
requires 15 GB of memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, LlavaNextImageProcessor

from tokenprune import VisionEncoder
from tokenprune.experiments.bench.architectures import load_architecture
from tokenprune.strategies import HiRED
from tokenprune.testing.families import FAMILIES
from tokenprune.testing.tiny_models import random_image

ARCHITECTURE = "llava-v1.6-vicuna-7b"
GIGABYTE = 1e9


def save_sparse_checkpoint(folder: Path) -> dict[str, float]:
    """Save a checkpoint whose LLM has no data on the disk, and return the sizes of its parts in GB.

    Args:
        folder: the folder of the checkpoint.
    """
    config, processor = load_architecture(ARCHITECTURE), copy.deepcopy(FAMILIES["llava_next"].processor())
    config.image_token_id = processor.image_token_id
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    is_vision = {name: not name.startswith(("model.language_model.", "lm_head.")) for name in shapes}
    torch.manual_seed(0)
    vision = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in shapes.items() if is_vision[name]}
    save_file(vision, folder / "vision.safetensors", {"format": "pt"})
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        if not is_vision[name]:
            size = 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    with (folder / "llm.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    files = {name: "vision.safetensors" if is_vision[name] else "llm.safetensors" for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    model.config.save_pretrained(folder)
    side = config.vision_config.image_size
    processor.image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    processor.patch_size = config.vision_config.patch_size
    processor.save_pretrained(folder)
    sizes = {"vision side": sum(2 * tensor.numel() for tensor in vision.values()), "LLM": end}
    return {name: round(size / GIGABYTE, 2) for name, size in sizes.items()}


def read_peak() -> float:
    """Return the peak memory of this process in GB.

    `resource.getrusage` would include the peak of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return round(int(kilobytes) * 1024 / GIGABYTE, 2)


def run_part(part: str, folder: str) -> None:
    """Load a part of the checkpoint, and print the peak memory in GB after each step as JSON.

    Args:
        part: ``"imports"``, ``"encoder"`` or ``"whole"``.
        folder: the folder of the checkpoint.
    """
    peaks = {"imports": read_peak()}
    if part == "encoder":
        encoder = VisionEncoder.from_pretrained(folder, HiRED(0.2))
        peaks["load"] = read_peak()
        peaks["tokens"] = len(encoder.encode([random_image(672, 672)]).tensors[0])
        peaks["encode an image"] = read_peak()
    if part == "whole":
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        peaks["load"] = read_peak()
    print(json.dumps(peaks))


def main() -> None:
    """Print sizes and peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", action="store_true", help="also load the complete model (15 GB)")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(*options.part)
        return
    with tempfile.TemporaryDirectory() as folder:
        print("weights in bfloat16, GB:", save_sparse_checkpoint(Path(folder)))
        for part in ("encoder", *(["whole"] if options.whole else [])):
            command = [sys.executable, "-m", "research.vllm.memory", "--part", part, folder]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            print(f"peak of the process, GB: {part}", output.splitlines()[-1])


if __name__ == "__main__":
    main()
