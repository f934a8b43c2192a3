"""An accelerator emulated on the CPU: its tensors hold real values, and operators, reads and copies are counted.

A tensor on the emulated device wraps a CPU tensor. The device has a name of its own, so code that compares devices, or
that mixes tensors of two devices, behaves as on a GPU. Every operator runs on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "emulated"
DEVICE = f"{NAME}:0"
READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "_linalg_check_errors"),
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    *("bincount", "_to_sparse"),
}
"""Operators whose result the host reads, or whose shape depends on values; on a GPU the host waits for each of them."""
COPIES = {"_to_copy", "copy_"}
"""Operators that accept an input on another device."""
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index_put"}
"""Operators that read the number of true entries if an index is a mask, and that accept indices of another device."""


class _UnavailableBackend(backend_registration._DummyBackendModule):
    """A backend without devices, so that other tests of the process do not select it as their accelerator."""

    def is_available(self) -> bool:
        """Return False."""
        return False

    def device_count(self) -> int:
        """Return 0."""
        return 0


class _UnavailableHook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        """Return False."""
        return False


if torch._C._get_privateuse1_backend_name() != NAME:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _UnavailableBackend(), _UnavailableHook())
_KERNELS = torch.library.Library("aten", "IMPL")
"""Holds the kernel of `_read_scalar`, which PyTorch removes with this object."""


def _read_scalar(tensor: DeviceTensor) -> Any:
    """Return the value of a scalar that `torch.tensor` reads from a list, without a call of `__torch_dispatch__`."""
    if isinstance(device := _get_current_dispatch_mode(), EmulatedDevice):
        device.operators["_local_scalar_dense"] += 1
        device.reads["_local_scalar_dense"] += 1
    return tensor.value.item()


_KERNELS.impl("_local_scalar_dense", _read_scalar, "PrivateUse1")


class DeviceTensor(Tensor):
    """A tensor on the emulated device.

    Args:
        value: the CPU tensor with its values.
    """

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> DeviceTensor:
        """Return a wrapper with shape, strides and dtype of the value."""
        wrapper: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
        )
        wrapper.value = value
        return wrapper

    def tolist(self) -> Any:
        """Return the values, which is a read."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        """Return the values, without a read."""
        return f"DeviceTensor({self.value!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator outside of `EmulatedDevice`, where nothing is counted."""
        with EmulatedDevice():
            return func(*args, **(kwargs or {}))


class EmulatedDevice(TorchDispatchMode):
    """Counts what runs on the emulated device inside the block, by name of the operator.

    Attributes:
        operators: operators with an input or output on the device.
        reads: operators whose values or shapes the host waits for.
        copies: copies from the CPU to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._lifts_cpu_tensors = False

    def __enter__(self) -> EmulatedDevice:
        """Enter the mode; `torch.tensor(..., device=...)` then copies a CPU tensor by a counted operator."""
        self._lifts_cpu_tensors = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the mode."""
        torch._C._set_only_lift_cpu_tensors(self._lifts_cpu_tensors)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count an operator and run it on the CPU.

        Raises:
            RuntimeError: if the inputs lie on two devices, as on a GPU.
        """
        options = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        reads_device = any(isinstance(tensor, DeviceTensor) for tensor in inputs)
        target = options.get("device")
        writes_device = target is not None and torch.device(target).type == NAME
        if not reads_device and not writes_device:
            return func(*args, **options)
        name = func._schema.name.split("::")[1]
        self.operators[name] += 1
        if writes_device:
            options["device"] = "cpu"
        values, value_options = tree_map(_value, args), tree_map(_value, options)
        is_copied_back = name == "copy_" and not isinstance(args[0], DeviceTensor)
        if is_copied_back or (name == "_to_copy" and target is not None and not writes_device):
            self.reads["copy to the CPU"] += 1
            return func(*values, **value_options)
        indices = [index for index in args[1] if isinstance(index, Tensor)] if name in INDEXING else []
        has_read_shape = name == "repeat_interleave" and options.get("output_size") is None
        if name in READS or has_read_shape or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.reads[name] += 1
        on_cpu = [tensor for tensor in indices or inputs if not isinstance(tensor, DeviceTensor) and tensor.dim()]
        if on_cpu and not indices and name not in COPIES:
            raise RuntimeError(f"{func}: inputs on two devices, one of shape {list(on_cpu[0].shape)} on the CPU")
        if on_cpu:
            self.copies[name] += 1
        result = func(*values, **value_options)
        if func._schema.is_mutable and name.endswith("_"):
            return args[0]
        return tree_map(_wrap, result)


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, DeviceTensor) else leaf


def _wrap(leaf: Any) -> Any:
    return DeviceTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor) else leaf


def to_device(tree: Any) -> Any:
    """Return a nested structure with copies of its tensors on the emulated device."""
    return tree_map(lambda leaf: _wrap(leaf.detach().clone()) if isinstance(leaf, Tensor) else leaf, tree)


def to_cpu(tensor: Tensor) -> Tensor:
    """Return the values of a tensor, without counting a read."""
    value: Tensor = _value(tensor)
    return value


def move_model(model: Any) -> Any:
    """Move the weights of a model to the emulated device in place, and return the model."""

    def replace_all(entries: dict[str, Any], wrap: Callable[[Tensor], Tensor]) -> None:
        for name, tensor in entries.items():
            entries[name] = tensor if tensor is None else wrap(tensor)

    for module in model.modules():
        replace_all(module._parameters, lambda tensor: nn.Parameter(_wrap(tensor.detach()), requires_grad=False))
        replace_all(module._buffers, _wrap)
    return model
