"""Loads checkpoints, and makes model inputs of images and questions."""

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
        name: `mini`, a folder, or a hub id.
        device: `auto` or a torch device.
        dtype: `auto` (float32 on a CPU, the checkpoint's own elsewhere) or the name of a torch dtype.

    Raises:
        ValueError: if the checkpoint, the device or the dtype cannot be had.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "auto"
    elif not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype} is no torch dtype; use auto, float32, bfloat16 or float16")
    place = _place(name)
    try:
        processor = AutoProcessor.from_pretrained(place)
        model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype).eval()
    except Exception as error:  # whatever is wrong with a checkpoint, it is the checkpoint that is wrong
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"--model {name} cannot be loaded as an image-text-to-text checkpoint: {first}") from error
    find_adapter(model)  # an unsupported family is answered before anything is generated
    try:
        return model.to(device), processor
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {' '.join(str(error).split())}") from error


def _place(name: str) -> str:
    """Return the folder or hub id of a model.

    Raises:
        ValueError: if it can be neither.
    """
    place = str(mini.path()) if name == "mini" else name
    if not Path(place).is_dir() and (place.startswith((".", "/", "~")) or place.count("/") != 1):
        raise ValueError(f"--model {name}: no such folder; give `mini`, a checkpoint folder, or a hub id (owner/name)")
    return place


def checkpoint_folder(name: str, option: str = "model") -> Path:
    """Return the folder with the files of a checkpoint: its own, or the snapshot in the cache of the hub.

    Args:
        name: `mini`, a folder, or a hub id.
        option: the option that names it, ``"model"`` or ``"text_model"``.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if name == "mini":
        return mini.path() if option == "model" else mini.text_path()
    place = _place(name) if option == "model" else name
    if Path(place).is_dir():
        return Path(place)
    try:
        return _snapshot(place)
    except OSError as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"--{option} {name} cannot be found: {first}") from error


@cache
def _snapshot(repository: str) -> Path:
    """Return the folder of a hub repository in the cache; the hub is read once per process.

    Raises:
        OSError: if the repository has no configuration of a model, nor of an adapter of peft.
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
    """Return whether a folder is a snapshot in the cache of the hub; its name is then the commit."""
    return folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) is not None


def outline(name: str) -> Any:
    """Return a model without weights, to see whether there is such a model and what it can give.

    Args:
        name: `mini`, a folder, or a hub id.

    Raises:
        ValueError: if it cannot be had.
        TypeError: if no adapter knows it.
    """
    place = _place(name)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(place))
    except Exception as error:  # as in `load`
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"--model {name} cannot be loaded as an image-text-to-text checkpoint: {first}") from error
    find_adapter(model)
    return model


def model_inputs(model: Any, processor: Any, image: Image.Image, questions: Sequence[str], file: str) -> Any:
    """Return the inputs of `generate` for questions about one image, one row each, by the chat template if any.

    Args:
        model: the model; inputs go to its device and dtype.
        processor: its processor.
        image: the image.
        questions: the questions.
        file: what the image is called, for errors.

    Raises:
        ValueError: if the processor or the model's own unpadding can make nothing of the image's shape.
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
    # Some processors take the images of a batch as one list, others as a list for each prompt.
    for images in ([image] * len(prompts), [[image]] * len(prompts)):
        try:
            return processor(images=images, **options).to(model.device, model.dtype)
        except (ValueError, RuntimeError, ZeroDivisionError, TypeError, AttributeError) as error:
            errors.append(error)
    raise ValueError(
        f"{file}: the model's processor cannot take an image of {image.width} x {image.height} "
        f"({' '.join(str(errors[0]).split())}); crop or pad it"
    ) from errors[0]
