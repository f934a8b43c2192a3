"""Builds the measured model, from a checkpoint or with random weights at full size, and its images and prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from tokenprune.experiments.bench.architectures import list_architectures, load_architecture
from tokenprune.experiments.bench.image_processors import build_image_processor
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.models import mini
from tokenprune.models._base.native_resolution import MergedPatchesAdapter
from tokenprune.models._base.tiled import TiledAdapter
from tokenprune.pipeline import Pipeline
from tokenprune.registry import suggest_name

QUESTION = "What is in the image?"
"""Question of the prompts for checkpoints. Models with random weights receive random token ids."""
LAYER_COUNT_KEYS = ("num_hidden_layers", "num_layers")
"""Keys of a text config that hold the number of layers."""

Size = tuple[int, int]
"""Height x width of an image in pixels."""


@dataclass(frozen=True, eq=False)
class BenchModel:
    """A model with its adapter and a function that prepares its inputs.

    Args:
        name: name that the user passed.
        model: the model, on its device.
        adapter: its adapter.
        weights: ``"checkpoint"`` or ``"random"``.
        layers: number of LLM layers of this model.
        full_layers: number of LLM layers before any were removed.
        prepare: returns the model inputs of images, with one prompt per image.
        processor: the processor of a checkpoint; None if the weights are random.
        pipelines: compiled pipelines by name of their variant; their graphs are used again in later calls.
    """

    name: str
    model: Any
    adapter: Adapter
    weights: str
    layers: int
    full_layers: int
    prepare: Callable[[Sequence[Image.Image]], Mapping[str, Any]]
    processor: Any = None
    pipelines: dict[str, Pipeline] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Return the description of the model for a result, as plain data."""
        config = self.model.config
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "weights": self.weights,
            "llm_layers": self.layers,
            "llm_layers_full": self.full_layers,
            "cut": self.layers < self.full_layers,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": {
                "llm": config.get_text_config()._attn_implementation,
                "vision": getattr(getattr(config, "vision_config", None), "_attn_implementation", None),
            },
        }


def load_bench_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    attn: str | None = None,
    llm_layers: int | None = None,
    prompt_tokens: int = 32,
) -> BenchModel:
    """Return a model with its adapter and its input function.

    Args:
        name: `mini`, a checkpoint folder or a hub id; for random weights, a shipped architecture or a `config.json`.
        device: `auto` or a torch device.
        dtype: `auto` (float32 on a CPU; elsewhere the checkpoint's own, or bfloat16) or the name of a torch dtype.
        attn: name of the attention kernel in transformers; None uses the default of transformers.
        llm_layers: number of LLM layers to keep; None keeps all.
        prompt_tokens: text tokens of a prompt if the weights are random.

    Raises:
        ValueError: if an option is not valid; the error names the option and the valid values.
        TypeError: if no adapter supports the model.
    """
    if llm_layers is not None and llm_layers < 1:
        raise ValueError(f"--llm-layers {llm_layers}: give at least 1")
    config = find_random_config(name)
    if config is not None:
        return build_random_model(name, config, device, dtype, attn, llm_layers, prompt_tokens)
    model, processor = load(name, device, dtype)
    _use_kernel(model, attn)
    adapter = find_adapter(model)
    decoder = attrgetter(getattr(adapter, "language_model_path", "language_model"))(model.base_model)
    full_layers = len(decoder.layers)
    if llm_layers is not None:
        _check_cut(llm_layers, full_layers)
        decoder.layers = nn.ModuleList(decoder.layers[:llm_layers])
        cut_layers(model.config, llm_layers)

    def prepare(images: Sequence[Image.Image]) -> Mapping[str, Any]:
        """Return the inputs of one batch with the same question about each image."""
        parts = [model_inputs(model, processor, image, [QUESTION], "image") for image in images]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return BenchModel(name, model, adapter, "checkpoint", len(decoder.layers), full_layers, prepare, processor)


def find_random_config(name: str) -> Any:
    """Return the config for a model with random weights, or None if the name belongs to a checkpoint.

    Args:
        name: name of a shipped architecture, path of a `config.json`, or name of a checkpoint.

    Raises:
        ValueError: if the file is not a model config, or if the name is neither an architecture nor a checkpoint.
    """
    if name in list_architectures():
        return load_architecture(name)
    if not name.endswith(".json"):
        if "/" not in name and name not in mini.MODELS and not Path(name).is_dir():
            hint = suggest_name(name, list_architectures(), 0.5)
            raise ValueError(
                f"--model {name}: no such folder or architecture{hint}; give `mini`, `mini-pages`, a checkpoint "
                f"folder, a hub id (owner/name), a config.json, or one of {', '.join(list_architectures())}"
            )
        return None
    try:
        return AutoConfig.for_model(**json.loads(Path(name).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--model {name} cannot be read as a config: {' '.join(str(error).split())}") from error


def build_random_model(
    name: str, config: Any, device: str, dtype: str, attn: str | None, llm_layers: int | None, prompt_tokens: int
) -> BenchModel:
    """Return a model with random weights. Throughput does not depend on the values of the weights."""
    text = config.get_text_config()
    full_layers = text.num_hidden_layers
    processor, ordinary_ids = build_image_processor(config), list_ordinary_ids(config)
    if llm_layers is not None:
        _check_cut(llm_layers, full_layers)
        cut_layers(config, llm_layers)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device(default_device if device == "auto" else device)
    if dtype == "auto":
        torch_dtype: Any = torch.float32 if target.type == "cpu" else torch.bfloat16
    else:
        torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"--dtype {dtype} is no torch dtype; use auto, float32, bfloat16 or float16")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    try:
        with target:  # draws the weights on the target device
            model = AutoModelForImageTextToText.from_config(config, dtype=torch_dtype).eval()
        model = model.to(target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {' '.join(str(error).split())}") from error
    _use_kernel(model, attn)
    adapter = find_adapter(model)

    def prepare(images: Sequence[Image.Image]) -> Mapping[str, Any]:
        vision = processor(images=list(images), return_tensors="pt")
        return build_random_prompts(adapter, dict(vision), len(images), ordinary_ids, prompt_tokens, model)

    return BenchModel(name, model, adapter, "random", text.num_hidden_layers, full_layers, prepare)


def cut_layers(config: Any, number: int) -> None:
    """Reduce the number of LLM layers in a config, in place."""
    text = config.get_text_config()
    for name in LAYER_COUNT_KEYS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, number)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:number]


def _check_cut(llm_layers: int, full_layers: int) -> None:
    if llm_layers > full_layers:
        raise ValueError(f"--llm-layers {llm_layers}: the LLM has only {full_layers}")


def _use_kernel(model: Any, attn: str | None) -> None:
    if attn is None:
        return
    try:
        model.set_attn_implementation(attn)
    except (ValueError, ImportError, KeyError) as error:
        raise ValueError(f"--attn {attn} cannot be used: {' '.join(str(error).split())[:300]}") from error


def list_ordinary_ids(config: Any) -> list[int]:
    """Return token ids without a special meaning, for random text."""
    special = set[int]()

    def collect(content: Mapping[str, Any]) -> None:
        for name, value in content.items():
            if isinstance(value, Mapping):
                collect(value)
            elif str(name).endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])

    collect(config.to_dict())
    vocabulary = range(3, min(config.get_text_config().vocab_size, 20_000))
    return [token_id for token_id in vocabulary if token_id not in special]


def build_random_prompts(
    adapter: Adapter, vision: dict[str, Any], rows: int, ordinary_ids: Sequence[int], length: int, model: Any
) -> dict[str, Any]:
    """Return the model inputs of images, with random text after each image.

    Args:
        adapter: the adapter of the model.
        vision: output of the image processor; the entry ``"num_patches"`` is removed.
        rows: number of images, with one image per prompt.
        ordinary_ids: token ids from which the text is drawn.
        length: text tokens of a prompt.
        model: determines the device of the inputs and the dtype of the pixels.
    """
    generator = torch.Generator().manual_seed(0)
    opening, closing = [], []
    if isinstance(adapter, MergedPatchesAdapter):
        numbers = [int(grid.prod()) // adapter.pooling**2 for grid in vision["image_grid_thw"]]
    elif isinstance(adapter, TiledAdapter):
        # These models group tiles by image from the ids around the placeholders.
        opening, closing = [ordinary_ids[0]], [ordinary_ids[1]]
        tokens = adapter.token_grid[0] * adapter.token_grid[1]
        numbers = [tokens * int(tiles) for tiles in vision.pop("num_patches")]
    else:
        numbers = [len(layout.packed) for layout in adapter.layouts(vision)]
    indices = torch.randint(len(ordinary_ids) - 2, (rows, length), generator=generator)
    texts = torch.tensor(ordinary_ids[2:])[indices].tolist()
    prompts = [
        [ordinary_ids[2], *opening, *[adapter.image_token_id] * number, *closing, *text]
        for number, text in zip(numbers, texts, strict=True)
    ]
    ids = torch.tensor(prompts)  # images of equal size have prompts of equal length
    image_inputs = {name: value for name, value in vision.items() if name in adapter.image_inputs}
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image_inputs}
    if adapter.has_vision_positions:
        inputs["mm_token_type_ids"] = (ids == adapter.image_token_id).int()
    return {name: _move_to_model(value, model) for name, value in inputs.items()}


def parse_image_size(text: str, option: str) -> Size:
    """Return height and width in pixels from a text such as `672x672`.

    Args:
        text: the text.
        option: the option that it is the value of, for the error.

    Raises:
        ValueError: if the text is not a size.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if match is None or not all(int(side) for side in match.groups()):
        raise ValueError(f"{option} {text}: give height x width in pixels, such as 672x672")
    return int(match[1]), int(match[2])


def _move_to_model(value: Any, model: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def random_image(size: Size, seed: int) -> Image.Image:
    """Return an image of smooth random blobs.

    Args:
        size: height x width in pixels.
        seed: seed of the random numbers; different for each image of a batch.
    """
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)
