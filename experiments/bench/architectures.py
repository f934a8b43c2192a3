"""Loads real architectures without weights: configs of published checkpoints, shipped as `configs/models/*.json`.

The cost of a model depends only on its shape. `docs/explanation/benchmark-method.md` lists the source of each config.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from tokenprune.registry import unknown_name_error

FOLDER = Path(__file__).parents[1] / "configs" / "models"


def list_architectures() -> list[str]:
    """Return the names of all shipped architectures."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def load_architecture(name: str, llm_layers: int | None = None) -> Any:
    """Return the transformers config of a published checkpoint.

    Args:
        name: name of the architecture, as in `list_architectures`.
        llm_layers: number of decoder layers to keep; None keeps all.

    Raises:
        LookupError: if there is no such architecture; the error names the most similar names.
        ValueError: if the number of layers is below 1 or larger than in the checkpoint.
    """
    names = list_architectures()
    if name not in names:
        raise unknown_name_error(name, names, "architecture", 0.5)
    values = json.loads((FOLDER / f"{name}.json").read_text())
    if llm_layers is not None:
        layers = values["text_config"]["num_hidden_layers"]
        if not 1 <= llm_layers <= layers:
            raise ValueError(f"{name} has {layers} LLM layers; {llm_layers} of them cannot be kept, give 1 to {layers}")
        values["text_config"]["num_hidden_layers"] = llm_layers
    return AutoConfig.for_model(**values)


def build_meta_model(config: Any, dtype: torch.dtype = torch.float16, attention: str = "eager") -> Any:
    """Return a model of the config on the meta device: it has shapes but no values, so no memory is allocated.

    Args:
        config: a transformers config.
        dtype: data type of the weights.
        attention: name of the attention function in transformers.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            # The model keeps the config and writes the name of the attention function into it; so pass a copy.
            model: Any = AutoModelForImageTextToText.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attention
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.tie_weights()
    return model.eval()
