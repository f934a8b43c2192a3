"""What is measured: a model, real or with random weights at full size, and images and prompts for it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from tokenprune.adapter import Adapter, find_adapter
from tokenprune.experiments.bench.architectures import architecture, architectures
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.models._base.native_resolution import MergedPatchesAdapter
from tokenprune.models._base.tiled import TiledAdapter

QUESTION = "What is in the image?"
"""What checkpoints are asked; models with random weights get random ids."""
CUT = ("num_hidden_layers", "num_layers")
"""Fields of a text config that say how many layers there are."""

Size = tuple[int, int]
"""Height x width of an image in pixels."""


@dataclass(frozen=True, eq=False)
class BenchModel:
    """A model that can be measured.

    Args:
        name: what it was called.
        model: the model, on its device.
        adapter: its adapter.
        weights: ``"checkpoint"`` or ``"random"``.
        layers: LLM layers that it has here.
        full_layers: LLM layers that it should have.
        prepare: makes model inputs of images, one prompt each.
        processor: the processor of a checkpoint; None if the weights are random.
    """

    name: str
    model: Any
    adapter: Adapter
    weights: str
    layers: int
    full_layers: int
    prepare: Callable[[Sequence[Image.Image]], Mapping[str, Any]]
    processor: Any = None

    def as_data(self) -> dict[str, Any]:
        """Return what a result should say about the model."""
        config = self.model.config
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "weights": self.weights,
            "llm_layers": self.layers,
            "llm_layers_full": self.full_layers,
            "cut": self.layers < self.full_layers,
            "parameters": sum(one.numel() for one in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": {
                "llm": config.get_text_config()._attn_implementation,
                "vision": getattr(getattr(config, "vision_config", None), "_attn_implementation", None),
            },
        }


def subject(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    attn: str | None = None,
    llm_layers: int | None = None,
    prompt_tokens: int = 32,
) -> BenchModel:
    """Return a model to measure.

    Args:
        name: `mini`, a checkpoint folder, a hub id, or for random weights a shipped architecture or a `config.json`.
        device: `auto` or a torch device.
        dtype: `auto` (float32 on a CPU; elsewhere the checkpoint's own, or bfloat16) or the name of a torch dtype.
        attn: attention kernel as transformers calls it; its own choice if left out.
        llm_layers: so many layers of the LLM; all if left out.
        prompt_tokens: text tokens of a prompt if the weights are random.

    Raises:
        ValueError: if something cannot be had; it says what and what to do.
        TypeError: if no adapter knows the model.
    """
    if llm_layers is not None and llm_layers < 1:
        raise ValueError(f"--llm-layers {llm_layers}: give at least 1")
    config = random_config(name)
    if config is not None:
        return random_subject(name, config, device, dtype, attn, llm_layers, prompt_tokens)
    model, processor = load(name, device, dtype)
    _use_kernel(model, attn)
    adapter = find_adapter(model)
    decoder = attrgetter(getattr(adapter, "language_model_at", "language_model"))(model.base_model)
    full = len(decoder.layers)
    if llm_layers is not None:
        _check_cut(llm_layers, full)
        decoder.layers = nn.ModuleList(decoder.layers[:llm_layers])
        cut_layers(model.config, llm_layers)

    def prepare(images: Sequence[Image.Image]) -> Mapping[str, Any]:
        """Ask one question about each image, in one batch."""
        parts = [model_inputs(model, processor, one, [QUESTION], "image") for one in images]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return BenchModel(name, model, adapter, "checkpoint", len(decoder.layers), full, prepare, processor)


def random_config(name: str) -> Any:
    """Return the config of a model that is to have random weights; None if a checkpoint is meant.

    Raises:
        ValueError: if it is no config of a model, and if it can be neither that nor a checkpoint.
    """
    if name in architectures():
        return architecture(name)
    if not name.endswith(".json"):
        if "/" not in name and name != "mini" and not Path(name).is_dir():
            near = difflib.get_close_matches(name, architectures(), n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"--model {name}: no such folder or architecture{hint}; give `mini`, a checkpoint folder, a hub id "
                f"(owner/name), a config.json, or one of {', '.join(architectures())}"
            )
        return None
    try:
        return AutoConfig.for_model(**json.loads(Path(name).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--model {name} cannot be read as a config: {' '.join(str(error).split())}") from error


def random_subject(
    name: str, config: Any, device: str, dtype: str, attn: str | None, llm_layers: int | None, prompt_tokens: int
) -> BenchModel:
    """Return a model with random weights: throughput does not depend on them."""
    text = config.get_text_config()
    full = text.num_hidden_layers
    pixels, words = image_processor(config), plain_ids(config)
    if llm_layers is not None:
        _check_cut(llm_layers, full)
        cut_layers(config, llm_layers)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    kind = getattr(torch, dtype, None) if dtype != "auto" else torch.float32 if place.type == "cpu" else torch.bfloat16
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"--dtype {dtype} is no torch dtype; use auto, float32, bfloat16 or float16")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    try:
        with place:  # weights are drawn where they will be
            model = AutoModelForImageTextToText.from_config(config, dtype=kind).eval()
        model = model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {' '.join(str(error).split())}") from error
    _use_kernel(model, attn)
    adapter = find_adapter(model)

    def prepare(images: Sequence[Image.Image]) -> Mapping[str, Any]:
        vision = pixels(images=list(images), return_tensors="pt")
        return random_prompts(adapter, dict(vision), len(images), words, prompt_tokens, model)

    return BenchModel(name, model, adapter, "random", text.num_hidden_layers, full, prepare)


def cut_layers(config: Any, number: int) -> None:
    """Let a config say that the LLM has fewer layers."""
    text = config.get_text_config()
    for name in CUT:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, number)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:number]


def _check_cut(llm_layers: int, full: int) -> None:
    if llm_layers > full:
        raise ValueError(f"--llm-layers {llm_layers}: the LLM has only {full}")


def _use_kernel(model: Any, attn: str | None) -> None:
    if attn is None:
        return
    try:
        model.set_attn_implementation(attn)
    except (ValueError, ImportError, KeyError) as error:
        raise ValueError(f"--attn {attn} cannot be used: {' '.join(str(error).split())[:300]}") from error


def image_processor(config: Any) -> Any:
    """Return the image processor of a family, from its config alone.

    Raises:
        ValueError: if it is not known how to make one for the family.
    """
    vision, family = config.vision_config, config.model_type
    side = getattr(vision, "image_size", None)
    side = side[0] if isinstance(side, (list, tuple)) else side
    square, shortest = {"height": side, "width": side}, {"shortest_edge": side}
    if family == "llava" and vision.model_type in ("clip_vision_model", "siglip_vision_model"):
        return transformers.CLIPImageProcessor(size=shortest, crop_size=square)
    if family == "llava_next":
        return transformers.LlavaNextImageProcessor(
            size=shortest, crop_size=square, image_grid_pinpoints=config.image_grid_pinpoints
        )
    if family == "llava_onevision":
        return transformers.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=config.image_grid_pinpoints)
    if family == "internvl":
        return transformers.GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=12)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        return transformers.Qwen2VLImageProcessor(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )
    raise ValueError(
        f"images for a {family} ({vision.model_type}) with random weights cannot be prepared without its processor; "
        "give a checkpoint folder, or one of llava, llava_next, llava_onevision, internvl, qwen2_vl, qwen2_5_vl"
    )


def plain_ids(config: Any) -> list[int]:
    """Return ids that mean nothing special, for random text."""
    special = set[int]()

    def collect(content: Mapping[str, Any]) -> None:
        for name, value in content.items():
            if isinstance(value, Mapping):
                collect(value)
            elif str(name).endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])

    collect(config.to_dict())
    return [one for one in range(3, min(config.get_text_config().vocab_size, 20_000)) if one not in special]


def random_prompts(
    adapter: Adapter, vision: dict[str, Any], rows: int, words: Sequence[int], length: int, model: Any
) -> dict[str, Any]:
    """Return model inputs of images with random text behind each.

    Args:
        adapter: the adapter of the model.
        vision: what the image processor made.
        rows: the number of images, one a prompt.
        words: ids to draw text from.
        length: text tokens of a prompt.
        model: inputs go to its device, pixels to its dtype.
    """
    draw = torch.Generator().manual_seed(0)
    opening, closing = [], []
    if isinstance(adapter, MergedPatchesAdapter):
        numbers = [int(one.prod()) // adapter.pooling**2 for one in vision["image_grid_thw"]]
    elif isinstance(adapter, TiledAdapter):
        # Ids around the placeholders tell such models which tiles are one image.
        opening, closing = [words[0]], [words[1]]
        tokens = adapter.token_grid[0] * adapter.token_grid[1]
        numbers = [tokens * int(one) for one in vision.pop("num_patches")]
    else:
        numbers = [len(layout.packed) for layout in adapter.layouts(vision)]
    text = torch.tensor(words[2:])[torch.randint(len(words) - 2, (rows, length), generator=draw)].tolist()
    prompts = [
        [words[2], *opening, *[adapter.image_token_id] * number, *closing, *one]
        for number, one in zip(numbers, text, strict=True)
    ]
    ids = torch.tensor(prompts)  # images of one size make prompts of one length
    names = {name: value for name, value in vision.items() if name in adapter.image_inputs}
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **names}
    if adapter.vision_positions:
        inputs["mm_token_type_ids"] = (ids == adapter.image_token_id).int()
    return {name: _to(value, model) for name, value in inputs.items()}


def _to(value: Any, model: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def image(size: Size, seed: int) -> Image.Image:
    """Return an image of smooth random blobs.

    Args:
        size: height x width in pixels.
        seed: another one for each image of a batch.
    """
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)
