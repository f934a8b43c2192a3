"""Loads checkpoints, and prepares model inputs from images and questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_file

from tokenprune.adapter import find_adapter
from tokenprune.models import mini


def load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Load a checkpoint and its processor.

    Args:
        name: `mini`, `mini-pages`, a folder, or a hub id.
        device: `auto` or a torch device.
        dtype: `auto` (float32 on a CPU, otherwise the dtype of the checkpoint) or the name of a torch dtype.

    Raises:
        ValueError: if the checkpoint cannot be loaded, or the device or the dtype cannot be used.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, weights_dtype = resolve_device(device, dtype)
    path = resolve_name(name)
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=weights_dtype or "auto").eval()
    except Exception as error:  # a broken checkpoint raises errors of many types
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"--model {name} cannot be loaded as an image-text-to-text checkpoint: {message}") from error
    find_adapter(model)  # raises for an unsupported model family before the first answer
    try:
        return model.to(device), processor
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {' '.join(str(error).split())}") from error


def resolve_device(device: str, dtype: str) -> tuple[str, torch.dtype | None]:
    """Return the torch device and the dtype of the weights; None is the dtype of the checkpoint.

    Args:
        device: `auto` or a torch device.
        dtype: `auto` (float32 on a CPU, otherwise the dtype of the checkpoint) or the name of a torch dtype.

    Raises:
        ValueError: if there is no such dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        return device, torch.float32 if device == "cpu" else None
    value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"--dtype {dtype} is no torch dtype; use auto, float32, bfloat16 or float16")
    return device, value


def resolve_name(name: str) -> str:
    """Return the folder or hub id of a model.

    Raises:
        ValueError: if the name is neither a folder nor a possible hub id.
    """
    path = str(mini.path(name)) if name in mini.MODELS else name
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise ValueError(
            f"--model {name}: no such folder; give `mini`, `mini-pages`, a checkpoint folder, or a hub id (owner/name)"
        )
    return path


def find_checkpoint(name: str, option: str = "model") -> Path:
    """Return the folder with the files of a checkpoint: a local folder, or the snapshot in the hub cache.

    Args:
        name: `mini`, `mini-pages`, a folder, or a hub id.
        option: the option of the checkpoint, ``"model"`` or ``"text_model"``, also for errors.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if name in mini.MODELS:
        return mini.path(name) if option == "model" else mini.text_path(name)
    path = resolve_name(name) if option == "model" else name
    if Path(path).is_dir():
        return Path(path)
    try:
        return _find_snapshot(path)
    except OSError as error:
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"--{option} {name} cannot be found: {message}") from error


@cache
def _find_snapshot(repository: str) -> Path:
    """Return the folder of a hub repository in the cache; the hub is read once per process.

    Raises:
        OSError: if the repository has neither a model configuration nor a PEFT adapter configuration.
    """
    try:
        config = cached_file(repository, "config.json")
    except OSError:
        try:
            config = cached_file(repository, "adapter_config.json")
        except OSError:
            config = None
        if config is None:
            raise
    return Path(str(config)).parent


def is_hub_snapshot(folder: Path) -> bool:
    """Return whether a folder is a snapshot in the hub cache, whose folder name is the commit."""
    return folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) is not None


def build_without_weights(name: str) -> Any:
    """Return a model without weights, on the meta device, to check that it exists and which signals it provides.

    Args:
        name: `mini`, `mini-pages`, a folder, or a hub id.

    Raises:
        ValueError: if the model cannot be built.
        TypeError: if no adapter supports it.
    """
    path = resolve_name(name)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    except Exception as error:  # as in `load`
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"--model {name} cannot be loaded as an image-text-to-text checkpoint: {message}") from error
    find_adapter(model)
    return model


def model_inputs(model: Any, processor: Any, image: Image.Image, questions: Sequence[str], file: str) -> Any:
    """Return the inputs of `generate` for questions about one image, one row per question.

    Prompts follow the chat template of the processor, or the LLaVA-1.5 format if it has none.

    Args:
        model: the model; inputs are moved to its device and dtype.
        processor: its processor.
        image: the image.
        questions: the questions.
        file: name of the image, for errors.

    Raises:
        ValueError: if the processor or the unpadding of the model cannot process the size of the image.
    """
    prompts = []
    for question in questions:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            prompts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
        else:
            prompts.append(f"USER: <image>\n{question} ASSISTANT:")
    options = {"text": prompts, "return_tensors": "pt", "padding": True, "padding_side": "left"}
    errors: list[Exception] = []
    # Some processors expect the images of a batch as one list, and some expect one list per prompt.
    for images in ([image] * len(prompts), [[image]] * len(prompts)):
        try:
            return processor(images=images, **options).to(model.device, model.dtype)
        except (ValueError, RuntimeError, ZeroDivisionError, TypeError, AttributeError) as error:
            errors.append(error)
    raise ValueError(
        f"{file}: the model's processor cannot take an image of {image.width} x {image.height} "
        f"({' '.join(str(errors[0]).split())}); crop or pad it"
    ) from errors[0]
