"""Compiled graphs of a model and a strategy: ``reducer(model, compile=True)``.

A graph has static shapes. The pipeline therefore pads reduced prompts to a multiple of a width, and each part keeps one
graph per layout and shape (`GraphCache`). On a GPU the graphs run as CUDA graphs, whose outputs are overwritten by the
next call; `copy_outputs` keeps them. The interface between the pipeline and the parts of a model is `CompiledLLM`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tokenprune.adapter import Adapter, adapters
from tokenprune.capabilities import Compilable

if TYPE_CHECKING:
    from tokenprune.generation import GenerateOptions

T = TypeVar("T")

COMPILED_WIDTH = 64
"""The number of which the width of a reduced prompt is a multiple in compiled calls, if the caller sets no number."""
MAX_GRAPHS = 32
"""The largest number of graphs of one part of a model; the least recently used graph is removed."""


@dataclass(frozen=True)
class CompileOptions:
    """Options of `torch.compile`.

    Args:
        backend: the compiler.
        mode: the mode of the compiler; ``"reduce-overhead"`` uses CUDA graphs on a GPU. None for compilers without
            modes.
    """

    backend: str = "inductor"
    mode: str | None = "reduce-overhead"


class CompiledLLM(ABC):
    """The compiled language model of one live model."""

    @abstractmethod
    def attached(self) -> AbstractContextManager[None]:
        """Return a context in which the model's `forward` and `generate` run the compiled graphs."""

    @abstractmethod
    def select_cache(self, options: GenerateOptions) -> dict[str, Any]:
        """Return arguments of `generate`: the static cache of the graphs, if the call can use it.

        Args:
            options: the options of the call.
        """

    @abstractmethod
    def release_caches(self) -> None:
        """Forget the static caches, because the caller of `generate` received one of them."""


class GraphCache:
    """Compiled functions by key; at most `MAX_GRAPHS`."""

    def __init__(self) -> None:
        self._functions: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of compiled functions."""
        return len(self._functions)

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the compiled function of a key, and build it if there is none.

        Args:
            key: the layout and the shapes of the inputs.
            build: returns the compiled function.
        """
        if key not in self._functions:
            self._functions[key] = build()
            if len(self._functions) > MAX_GRAPHS:
                self._functions.popitem(last=False)
        self._functions.move_to_end(key)
        function: T = self._functions[key]
        return function


def compile_function(function: Callable[..., T], options: CompileOptions, name: str) -> Callable[..., T]:
    """Return a function that runs as one compiled graph of static shapes.

    Args:
        function: a function of tensors, written in Python.
        options: the compiler.
        name: the part of the model or the strategy, for messages.
    """
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function!r} is no Python function")
    # torch stores graphs with the code object, so each compiled function gets its own copy.
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    compiled = torch.compile(copy, fullgraph=True, dynamic=False, backend=options.backend, mode=options.mode)

    def run(*args: Any, **kwargs: Any) -> T:
        if torch.cuda.is_available():
            torch.compiler.cudagraph_mark_step_begin()  # outputs of earlier calls are copied, see `copy_outputs`
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(line.strip() for line in str(error).strip().split("\n")[:2])
            raise RuntimeError(
                f"{name} is no single graph for torch.compile ({reason}); use the strategy without compile=True"
            ) from error

    return run


def copy_outputs(outputs: T) -> T:
    """Return a nested structure with copies of its tensors on a GPU, which the next run of a CUDA graph overwrites.

    Args:
        outputs: the outputs of a compiled function.
    """
    copied: T = tree_map_only(Tensor, lambda value: value.clone() if value.is_cuda else value, outputs)
    return copied


def compile_llm(adapter: Adapter, options: CompileOptions | None, multiple: int) -> CompiledLLM | None:
    """Return the compiled language model of an adapter, whose tower is compiled from now on; None without options.

    Args:
        adapter: the adapter of the model.
        options: the compiler; None compiles nothing.
        multiple: number of which the width of a compiled prefill is a multiple.

    Raises:
        ValueError: if the family or a part of the model cannot be compiled.
    """
    if options is None:
        return None
    if not isinstance(adapter, Compilable):
        families = sorted(kind.family for kind in adapters().values() if issubclass(kind, Compilable))
        raise ValueError(
            f"compile=True does not support {type(adapter.model).__name__}; it supports {', '.join(families)}. "
            "Attach the strategy without compile=True"
        )
    return adapter.compile_parts(options, multiple)


def check_gradients() -> None:
    """Raise an error if gradients are recorded, which compiled calls do not support.

    Raises:
        RuntimeError: if gradients are recorded.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "compile=True computes no gradients; call the model inside torch.no_grad() or torch.inference_mode(), or "
            "attach the strategy without compile=True"
        )


def resolve_multiple(multiple: int | None, options: CompileOptions | None) -> int:
    """Return the number of which the width of a reduced prompt is a multiple.

    Args:
        multiple: the number of the caller; None uses `COMPILED_WIDTH` in compiled calls, and otherwise 1.
        options: the compiler; None if nothing is compiled.

    Raises:
        ValueError: if the number is not positive.
    """
    if multiple is None:
        return 1 if options is None else COMPILED_WIDTH
    if multiple < 1:
        raise ValueError(f"pad_to_multiple_of={multiple} is not positive; 1 adds no padding")
    return multiple
