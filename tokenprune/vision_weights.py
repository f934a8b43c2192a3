"""Loads the vision side of a checkpoint: the vision tower, the projector and newline tokens, without the LLM.

The model is built on the meta device, where its LLM takes no memory. The tensors of the vision side are then read from
the safetensors files of the checkpoint, with transformers' own conversion of the names in older checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from tokenprune.adapter import Adapter, adapters, find_adapter
from tokenprune.capabilities import HasDecoder, require_capability


def load_vision_side(checkpoint: str, device: str | torch.device, dtype: torch.dtype | None = None) -> Adapter:
    """Load the vision side of a checkpoint and return the adapter of its model; the LLM stays on the meta device.

    Args:
        checkpoint: a folder or a hub id. Only those files of a hub repository are downloaded that hold tensors of the
            vision side.
        device: the device of the vision side.
        dtype: the dtype of the weights; None takes the dtype of the checkpoint.

    Raises:
        ValueError: if the checkpoint is quantized, has no safetensors, or lacks tensors of the vision side.
        TypeError: if no adapter supports the model, or no server accepts embeddings of its family.
    """
    model = build_on_meta(checkpoint, dtype)
    adapter = find_adapter(model)
    check_family(adapter)
    names = list_vision_names(model, require_capability(adapter, HasDecoder).decoder_modules.decoder)
    conversions: Any = get_model_conversion_mapping(model)
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file, keys in find_tensors(checkpoint, model, conversions, names).items():
            opened = stack.enter_context(safe_open(file, framework="pt"))
            tensors |= {key: opened.get_slice(key) for key in keys}
        options = LoadStateDictConfig(
            device_map={"": torch.device(device)},
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=conversions,
        )
        report, _ = convert_and_load_state_dict_in_model(model, tensors, options)
    faults = sorted({*(report.missing_keys & names), *(key for key, *_ in report.mismatched_keys)})
    if faults or report.conversion_errors:
        raise ValueError(
            f"{checkpoint} does not fit {type(model).__name__}: {len(faults)} tensors of its vision side are missing "
            f"or have another shape, such as {(faults or sorted(report.conversion_errors))[0]}"
        )
    restore_buffers(model, names, torch.device(device))
    return adapter


def build_on_meta(checkpoint: str, dtype: torch.dtype | None) -> Any:
    """Return the model of a checkpoint without weights, on the meta device.

    Args:
        checkpoint: a folder or a hub id.
        dtype: the dtype of the weights; None takes the dtype of the checkpoint.

    Raises:
        ValueError: if the configuration cannot be read, or the checkpoint is quantized.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype or config.dtype).eval()
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"{checkpoint} cannot be loaded as an image-text-to-text checkpoint: {message}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{checkpoint} is quantized, but a vision side is loaded without quantization; name the original "
            "checkpoint here. The server can run the quantized one"
        )
    model.config.name_or_path = checkpoint
    return model


def check_family(adapter: Adapter) -> None:
    """Raise a `TypeError` if no server accepts the visual tokens of a family in place of an image."""
    if not adapter.supports_image_embeds:
        names = ", ".join(sorted(kind.family for kind in adapters().values() if kind.supports_image_embeds))
        raise TypeError(
            f"a server does not accept the visual tokens of {adapter.family} in place of an image; supported families: "
            f"{names} (docs/how-to/serve-with-vllm.md has the reasons)"
        )


def list_vision_names(model: Any, decoder: nn.Module) -> set[str]:
    """Return the names of all tensors of a model outside its LLM and its language model head.

    Args:
        model: the model.
        decoder: the LLM.
    """
    skipped = tuple(
        f"{name}." for name, module in model.named_modules() if module in (decoder, model.get_output_embeddings())
    )
    names = (name for tensors in (model.named_parameters(), model.named_buffers()) for name, _ in tensors)
    return {name for name in names if not name.startswith(skipped)}


def find_tensors(checkpoint: str, model: Any, conversions: Sequence[Any], names: set[str]) -> dict[str, list[str]]:
    """Return the safetensors files that hold some tensors of a model, with their keys in each file.

    Args:
        checkpoint: a folder or a hub id.
        model: the model of the checkpoint.
        conversions: the conversions of the names in older checkpoints.
        names: the names of the tensors in the model.

    Raises:
        ValueError: if the checkpoint has no safetensors.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    files: dict[str, list[str]] = {}
    for key, file in list_keys(checkpoint).items():
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if names & {name, key}:
            files.setdefault(file, []).append(key)
    return {str(cached_file(checkpoint, file)): keys for file, keys in files.items()}


def list_keys(checkpoint: str) -> dict[str, str]:
    """Return the name of the safetensors file of each key of a checkpoint.

    Args:
        checkpoint: a folder or a hub id.

    Raises:
        ValueError: if the checkpoint has no safetensors.
    """
    missing = {"_raise_exceptions_for_missing_entries": False}
    if index := cached_file(checkpoint, SAFE_WEIGHTS_INDEX_NAME, **missing):
        with open(index) as text:
            return dict(json.load(text)["weight_map"])
    if file := cached_file(checkpoint, SAFE_WEIGHTS_NAME, **missing):
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), SAFE_WEIGHTS_NAME)
    raise ValueError(
        f"{checkpoint} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; load it with transformers once, "
        "and save it with model.save_pretrained"
    )


def restore_buffers(model: Any, names: set[str], device: torch.device) -> None:
    """Create the buffers that no checkpoint stores, such as position ids, with the values of a new model.

    Args:
        model: the model; its loaded tensors are not changed.
        names: the names of the tensors of the vision side.
        device: the device of the buffers.
    """
    for name, buffer in list(model.named_non_persistent_buffers()):
        if name in names:
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # skips loaded tensors; tensors on the meta device have no values
