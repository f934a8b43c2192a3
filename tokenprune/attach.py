"""Attaches a strategy to a live transformers model; no other module modifies a model.

An attachment adds two objects to the model and removes them again: hooks of `forward` for plain calls (scoring,
training), and an instance attribute `generate`. Both prepare their calls in the `Pipeline`. The code, weights and
config of the model do not change. Features reach the model through transformers' `mm_encoder_outputs`.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from tokenprune.adapter import find_adapter
from tokenprune.caches import mark_caches
from tokenprune.compiled import CompileOptions, resolve_multiple
from tokenprune.dependencies import check_dependencies
from tokenprune.hooks import Hook
from tokenprune.literals import check_literal
from tokenprune.pipeline import Pipeline
from tokenprune.prepared_call import PreparedCall
from tokenprune.run import Run

if TYPE_CHECKING:
    from tokenprune.reducer import TokenReducer

Outputs: TypeAlias = Literal["full", "reduced"]
"""Length of the logits and hidden states of a plain call: of the full prompt, or of the reduced prompt."""
EXPANDED = ("logits", "hidden_states", "last_hidden_state")
"""Fields of an output object with one entry per prompt position."""
_ATTACH_LOCK = threading.Lock()


class Attachment:
    """A strategy with the model to attach it to; the value of ``reducer(model)``.

    Use it as a context manager, ``with reducer(model) as run:``, or through `TokenReducer.attach` and `detach`.

    Args:
        model: a transformers model of a supported family, or a wrapper around one.
        reducer: the strategy.
        question: the question of all prompts, or a list with a question per prompt row; None reads it from the prompt.
        tokenizer: decodes the prompt; None loads the tokenizer of the model's own folder or hub id.
        outputs: the length of the outputs of a plain call, see `TokenReducer.__call__`.
        strict: whether leaving the block raises an error if no image was reduced.
        keep_pixels: whether the first images keep their pixels for drawing.
        compile: whether tower, reducer and language model run as compiled graphs, see `TokenReducer.__call__`.
        pad_to_multiple_of: see `TokenReducer.__call__`.

    Raises:
        ValueError: if `outputs` is not known, or `pad_to_multiple_of` is not positive.
    """

    def __init__(
        self,
        model: Any,
        reducer: TokenReducer,
        question: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        outputs: Outputs = "full",
        strict: bool = False,
        keep_pixels: bool = True,
        compile: bool | CompileOptions = False,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        check_literal("outputs", outputs, get_args(Outputs))
        self._model, self._reducer, self._strict = model, reducer, strict
        compile_options = CompileOptions() if compile is True else compile or None
        self._options: dict[str, Any] = {
            "question": question,
            "tokenizer": tokenizer,
            "keep_pixels": keep_pixels,
            "compile_options": compile_options,
            "pad_to_multiple_of": resolve_multiple(pad_to_multiple_of, compile_options),
        }
        self._outputs = outputs
        self._was_used = False
        self._undo: ExitStack | None = None
        self._run: Run | None = None
        self.pipeline: Pipeline | None = None
        """The strategy bound to the model; None if it is not attached."""

    @property
    def run(self) -> Run:
        """The record of the calls since the strategy was attached.

        Raises:
            RuntimeError: if the strategy was never attached.
        """
        if self._run is None:
            raise RuntimeError(self._not_attached())
        return self._run

    def attach(self) -> Run:
        """Attach the strategy, and return the record.

        Raises:
            TypeError: if no adapter supports the model.
            ValueError: if the adapter does not provide a signal that the strategy requires.
            RuntimeError: if the model already has a reducer, or if the version of a
                dependency is out of bounds.
        """
        self._was_used = True
        check_dependencies()
        wrappers, model = unwrap(self._model)
        adapter = find_adapter(model)
        with _ATTACH_LOCK, ExitStack() as undo:
            previous = vars(model).get("generate")
            if isinstance(previous, _Generate):
                raise RuntimeError(
                    f"{previous.pipeline.run.strategy} is already attached to this model, and a model accepts one "
                    "reducer. Leave the first block (or call detach) before the next block; threads share one block"
                )
            pipeline = Pipeline(self._reducer, adapter, **self._options)
            undo.enter_context(pipeline.hold_hooks())
            hooks = [_ForwardHooks(module, model, pipeline, self._outputs) for module in (*wrappers, model)]
            for module_hooks in hooks:
                undo.callback(module_hooks.remove)
            if hasattr(model, "generate"):
                undo.callback(_restore_generate, model, previous)
                model.generate = _Generate(pipeline, hooks)
            self._undo, self._run, self.pipeline = undo.pop_all(), pipeline.run, pipeline
        return self._run

    def detach(self) -> None:
        """Remove the strategy from the model; without effect if it is not attached.

        Raises:
            ValueError: if the strategy returned an invalid selection that was not read from the device so far.
        """
        self._remove()
        if self._run is not None:
            self._run.raise_failed_checks()

    def _remove(self) -> None:
        undo, self._undo, self.pipeline = self._undo, None, None
        if undo is not None:
            undo.close()

    def __enter__(self) -> Run:
        """Attach the strategy for a block.

        Raises:
            RuntimeError: if this object is attached already.
        """
        if self._undo is not None:
            raise RuntimeError(
                f"this {type(self._reducer).__name__} is attached already; write `with reducer(model)` once per block"
            )
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Detach the strategy, and warn if no image was reduced."""
        self._remove()
        if kind is None:
            self.run.raise_failed_checks()
        if kind is None and self.run.account.image_count == 0:
            message = (
                f"{type(self._reducer).__name__} was attached, but no image went through the model inside the block, "
                "so nothing was reduced. Call model.generate(...) or model(...) with images inside the `with` block"
            )
            if self._strict:
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)

    def __getattr__(self, name: str) -> Any:
        """Raise an error that names the missing `with`."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"no attribute {name!r}: {self._not_attached()}")

    def __del__(self) -> None:
        """Warn if the strategy was never attached, because the model then ran without reduction."""
        if not vars(self).get("_was_used", True):
            warnings.warn(self._not_attached(), stacklevel=2)

    def _not_attached(self) -> str:
        name = type(self._reducer).__name__
        return (
            f"{name}(...)(model) does not attach the strategy by itself; write `with {name}(...)(model) as run:` "
            f"around the calls of the model, or `handle = {name}(...).attach(model)` and `handle.detach()`"
        )


def unwrap(model: Any) -> tuple[list[nn.Module], Any]:
    """Return the wrappers around a transformers model, outermost first, and the model inside.

    PEFT models, compiled models, `DataParallel` on one device and `DistributedDataParallel` are wrappers.

    Args:
        model: a model or a wrapper.

    Raises:
        TypeError: if the object is a pipeline, or a wrapper that copies the model to several devices.
    """
    wrappers: list[nn.Module] = []
    while True:
        if not isinstance(model, nn.Module):
            if isinstance(getattr(model, "model", None), nn.Module):
                raise TypeError(
                    f"{type(model).__name__} is not a model but contains a model; attach the strategy to its attribute "
                    f".model and call the {type(model).__name__} inside the block"
                )
            return wrappers, model
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise TypeError(
                "DataParallel copies the model to several devices in each call, and the copies are not reduced; attach "
                "the strategy to .module and run it on one device, or use DistributedDataParallel"
            )
        inner = _inner_model(model)
        if inner is None:
            return wrappers, model
        wrappers.append(model)
        model = inner


def _inner_model(model: nn.Module) -> nn.Module | None:
    """Return the model inside a wrapper; None if it is not a wrapper."""
    if callable(getattr(type(model), "get_base_model", None)):  # PEFT
        inner = model.get_base_model()  # type: ignore[operator]
        return inner if isinstance(inner, nn.Module) else None
    wrapped = {"_orig_mod", "module"}  # of torch.compile; of DataParallel, DistributedDataParallel etc.
    children = dict(model.named_children())
    return next(iter(children.values())) if len(children) == 1 and wrapped & children.keys() else None


class _ForwardHooks:
    """The hooks of a module's `forward` that reduce its plain calls.

    Each thread has its own call in progress. If a call is interrupted (Ctrl-C), torch runs no hook after it. The next
    call of the thread, or `remove`, then leaves the contexts of the interrupted call.

    Args:
        module: the model or a wrapper around it.
        model: the model; its `forward` defines the names of positional arguments.
        pipeline: the strategy bound to the model.
        outputs: the length of the output of a call.
    """

    def __init__(self, module: nn.Module, model: Any, pipeline: Pipeline, outputs: Outputs) -> None:
        self._module, self._model, self._pipeline, self._expands = module, model, pipeline, outputs == "full"
        self._names = _positional_names(module) or _positional_names(model)
        self._calls: dict[int, _CallInProgress | None] = {}
        """Call in progress by thread id; None during the preparation of its inputs."""
        self._is_active, self._lock = True, threading.Lock()
        self._handles = [
            module.register_forward_pre_hook(Hook(self.prepare_call), with_kwargs=True),
            module.register_forward_hook(Hook(self.finish_call), with_kwargs=True, always_call=True),
        ]

    def prepare_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], Any] | None:
        """Return the reduced inputs; None for calls of `generate`, of text only, and of shallow copies of the model."""
        if module is not self._module:
            return None
        self.leave_interrupted_call()
        pipeline, inputs = self._pipeline, {**dict(zip(self._names, args, strict=False)), **kwargs}
        if pipeline.is_generating or not self._begin():
            return None
        try:
            if pipeline.adapter.has_images(inputs):
                prepared = pipeline.prepare(inputs)
                call = _CallInProgress(prepared, _with_return_dict(inputs, self._model), self._expands)
                call.enter()
                self._calls[threading.get_ident()] = call
                return (), call.inputs
            pipeline.check_forward(inputs)
        except BaseException:
            self._end()
            raise
        self._end()
        return None

    def finish_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Leave the contexts of the call, and return its output at the length of the full prompt."""
        call = self._end() if module is self._module else None
        return None if call is None or output is None else call.restore(output)

    def leave_interrupted_call(self) -> None:
        """Leave the contexts of an interrupted call of this thread, without a lock if there is none."""
        if threading.get_ident() in self._calls:
            self._end()

    def remove(self) -> None:
        """Remove the hooks; if other threads are inside a call, the last call removes them."""
        with self._lock:
            self._is_active = False
        self._end()

    def _begin(self) -> bool:
        """Register a call of this thread, and return whether the hooks are still active."""
        with self._lock:
            if self._is_active:
                self._calls[threading.get_ident()] = None
            return self._is_active

    def _end(self) -> _CallInProgress | None:
        """Leave the contexts of this thread's call, and return the call; None if there is none."""
        call = self._calls.pop(threading.get_ident(), None)
        if call is not None:
            call.exit()
        with self._lock:
            if not (self._is_active or self._calls):
                for handle in self._handles:
                    handle.remove()
        return call


def _positional_names(module: nn.Module) -> list[str]:
    """Return the names of the positional arguments of a module's `forward`; an empty list for ``*args``."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _with_return_dict(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return inputs with a `return_dict`; if the call does not set it, its value comes from the model's config."""
    value = inputs.get("return_dict")
    return {**inputs, "return_dict": getattr(model.config, "return_dict", True) if value is None else value}


class _CallInProgress:
    """One plain call between its two hooks.

    Args:
        prepared: the reduced call.
        inputs: the inputs of the caller.
        expands: whether outputs return at the length of the full prompt.
    """

    def __init__(self, prepared: PreparedCall, inputs: Mapping[str, Any], expands: bool) -> None:
        self._prepared = prepared
        keep = inputs.get("logits_to_keep")
        self._keep = min(keep, prepared.rows.length) if isinstance(keep, int) else keep
        self._expands = expands and prepared.is_shortened
        self._as_tuple = self._expands and inputs.get("return_dict") is False
        self._stack = ExitStack()

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs of the model's own `forward`."""
        changes: dict[str, Any] = {"return_dict": True} if self._as_tuple else {}
        if self._expands and isinstance(self._keep, Tensor):
            changes["logits_to_keep"] = 0
        elif self._expands and self._keep:
            # The first returned position may be dropped: its logits then come from the last kept position before it.
            rows = self._prepared.rows
            changes["logits_to_keep"] = rows.index.shape[1] - int(rows.source[:, -self._keep].min())
        return {**self._prepared.inputs, **changes}

    def enter(self) -> None:
        """Enter the contexts of the call."""
        self._stack.enter_context(self._prepared.enter_contexts())

    def exit(self) -> None:
        """Leave the contexts of the call."""
        self._stack.close()

    def restore(self, output: Any) -> Any:
        """Return the output with logits and hidden states at the length of the full prompt."""
        if self._prepared.is_reduced:
            mark_caches(output)
        if not self._expands:
            return output
        for name in EXPANDED:
            value = output.get(name)
            if isinstance(value, Tensor):
                output[name] = self._expand(value, name)
            elif isinstance(value, tuple):
                output[name] = tuple(self._expand(state, name) for state in value)
        return output.to_tuple() if self._as_tuple else output

    def _expand(self, value: Tensor, name: str) -> Tensor:
        rows, keep = self._prepared.rows, self._keep if name == "logits" else None
        width = rows.index.shape[1]
        if isinstance(keep, Tensor):
            return rows.expand(value)[:, keep]
        if not keep and value.shape[1] > width:  # virtual tokens of prompt tuning precede the prompt
            virtual = value.shape[1] - width
            return torch.cat([value[:, :virtual], rows.expand(value[:, virtual:])], dim=1)
        return rows.expand(value, last=keep or 0)


class _Generate:
    """The `generate` of a model with a reducer attached.

    Args:
        pipeline: the strategy bound to the model.
        hooks: the hooks of plain calls; an interrupted call can still hold its contexts.
    """

    def __init__(self, pipeline: Pipeline, hooks: Sequence[_ForwardHooks]) -> None:
        self.pipeline, self._hooks = pipeline, hooks

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the parts of a deep copy or pickle: the unmodified `generate` of the copied model."""
        return _plain_generate, (self.pipeline.adapter.model,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate from the reduced prompt, and return sequences that begin with the full prompt.

        Raises:
            ValueError: if the prompt is passed twice.
        """
        for hooks in self._hooks:
            hooks.leave_interrupted_call()
        options = inspect.signature(GenerationMixin.generate).bind(None, *args, **kwargs).arguments
        inputs = {**options.pop("kwargs", {}), **options}
        inputs.pop("self")
        prompt, config = inputs.pop("inputs", None), inputs.pop("generation_config", None)
        if prompt is not None and inputs.get("input_ids") is not None:
            raise ValueError("`inputs` and `input_ids` are both set, and both are the prompt; pass only one of them")
        if prompt is not None:
            inputs["input_ids"] = prompt
        return self.pipeline.generate(inputs, config)


def _plain_generate(model: Any) -> Any:
    """Return the `generate` of a model without a reducer."""
    return type(model).generate.__get__(model)


def _restore_generate(model: Any, previous: Any) -> None:
    """Restore the previous instance attribute `generate` of a model; None removes the attribute."""
    if previous is not None:
        model.generate = previous
    else:
        model.__dict__.pop("generate", None)
