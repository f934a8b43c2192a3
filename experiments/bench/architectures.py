"""Real architectures without their weights: the configs of published checkpoints, shipped as `configs/models/*.json`.

The cost of a model depends on its shape only. `docs/results/performance.md` lists the source of each config.
"""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

FOLDER = Path(__file__).parents[1] / "configs" / "models"


def architectures() -> list[str]:
    """Return the names of all shipped architectures."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def architecture(name: str, llm_layers: int | None = None) -> Any:
    """Return the transformers config of a published checkpoint.

    Args:
        name: name of the architecture, as in `architectures`.
        llm_layers: decoder layers to keep; all if left out.

    Raises:
        LookupError: if there is no such architecture; the error names the nearest ones.
        ValueError: if it does not have so many layers.
    """
    known = architectures()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise LookupError(f"no architecture is called {name!r}.{hint} Known: {', '.join(known)}")
    values = json.loads((FOLDER / f"{name}.json").read_text())
    if llm_layers is not None:
        layers = values["text_config"]["num_hidden_layers"]
        if not 1 <= llm_layers <= layers:
            raise ValueError(f"{name} has {layers} LLM layers; {llm_layers} of them cannot be kept, give 1 to {layers}")
        values["text_config"]["num_hidden_layers"] = llm_layers
    return AutoConfig.for_model(**values)


def on_meta(config: Any, dtype: torch.dtype = torch.float16, attention: str = "eager") -> Any:
    """Return a model of the config on the meta device: it has shapes and no numbers, so nothing is allocated.

    Args:
        config: a transformers config.
        dtype: what the weights would be stored in.
        attention: name of the attention function, as transformers knows it.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            # A copy: the model keeps the config and writes the name of the attention function into it.
            model: Any = AutoModelForImageTextToText.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attention
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.tie_weights()
    return model.eval()
