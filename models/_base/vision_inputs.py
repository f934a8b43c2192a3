"""The arguments of a model's vision side, and the output objects that replace them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils.generic import ModelOutput

from tokenprune.adapter import FeatureInputs

T = TypeVar("T")

_RESULTS = WeakTensorKeyDictionary()
"""Results that were computed from model inputs on a device, by key, with the version of the tensor."""


def read_once(tensor: Tensor) -> Tensor:
    """Return a model input on the CPU; the values of a tensor are read from its device once.

    Layouts are computed several times in a call, and each read would make the host wait for the device.

    Args:
        tensor: a model input.
    """
    return compute_once(tensor, "values", tensor.cpu)


def compute_once(tensor: Tensor, key: Hashable, compute: Callable[[], T]) -> T:
    """Return a result that depends on a model input; on a device it is computed once until the input is modified.

    Args:
        tensor: a model input.
        key: identifies the result among those of the tensor.
        compute: computes the result, which does not refer to the tensor.
    """
    if tensor.device.type == "cpu" or tensor.is_inference():  # inference tensors do not count modifications
        return compute()
    version, results = _RESULTS.get(tensor, (None, None))
    if version != tensor._version:
        results = {}
        _RESULTS[tensor] = (tensor._version, results)
    if key not in results:
        results[key] = compute()
    result: T = results[key]
    return result


def list_feature_parameters(model: Any, modality: Literal["image", "video"]) -> frozenset[str]:
    """Return the parameters of the function that encodes a modality; empty if the model has no such function.

    Args:
        model: a vision-language model.
        modality: the modality.
    """
    encode = getattr(model.base_model, f"get_{modality}_features", None)
    return frozenset() if encode is None else frozenset(inspect.signature(encode).parameters) - {"kwargs"}


def select_inputs(inputs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the inputs with the given names that are not None.

    Args:
        inputs: the model inputs of a call.
        names: names of inputs.
    """
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def select_output_options(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call about outputs, which the `forward` of some models passes to the vision side."""
    return select_inputs(inputs, ("output_attentions", "output_hidden_states"))


def wrap_outputs(image_outputs: Any, video_outputs: Any) -> FeatureInputs:
    """Return `mm_encoder_outputs` with the output objects of images and videos.

    Args:
        image_outputs: an output object of `get_image_features`; None if no image has tokens.
        video_outputs: an output object of `get_video_features`; None if the call has no videos.
    """
    outputs = {} if image_outputs is None else {"image": image_outputs}
    if video_outputs is not None:
        outputs["video"] = copy_output(video_outputs)
    return FeatureInputs({"mm_encoder_outputs": outputs} if outputs else {})


def copy_output(outputs: ModelOutput) -> ModelOutput:
    """Return a shallow copy of an output object with its fields in the same order, which `copy.copy` changes.

    Args:
        outputs: an output object of transformers, which `generate` would expand in place for beams.
    """
    copied = copy.copy(outputs)
    for name in outputs:
        copied.move_to_end(name)
    return copied


def to_floating_dtype(value: Tensor, module: nn.Module) -> Tensor:
    """Return a tensor in the dtype in which a module computes: the dtype of its first floating-point weight.

    Args:
        value: a tensor.
        module: the module that receives it; if it has no such weight, the default dtype is used.
    """
    dtypes = (weight.dtype for weight in module.parameters() if weight.is_floating_point())
    return value.to(next(dtypes, torch.get_default_dtype()))
