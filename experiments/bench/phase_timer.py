"""Attributes the time or FLOPs of a call to its phases, without changing the call.

A `PhaseTimer` reads a quantity that only grows: a clock, or a count of FLOPs. It books each increase to the innermost
open phase. Phases therefore never overlap, and their sum is the total of the call. `instrument` opens and closes the
phases: it wraps public methods of a model, its adapter and a pipeline, and removes these wrappers afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from operator import attrgetter
from typing import Any

from torch.profiler import record_function

from tokenprune.adapter import Adapter
from tokenprune.capabilities import ReadsQuestion, Resizable
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._base.tower import TowerAdapter
from tokenprune.models._capture.hooks import CAPTURE_CONTEXT
from tokenprune.pipeline import Pipeline

FIRST_TOKEN_PHASES = (
    "vision encode",
    "signal capture",
    "projector",
    "packing",
    "reducer",
    "rewrite",
    "generate",
    "prefill",
)
"""Phases of a call up to its first token."""
ENCODE_PHASES = FIRST_TOKEN_PHASES[:6]
"""Phases that produce the inputs of the LLM."""
TOWER_PHASES = FIRST_TOKEN_PHASES[:1]
"""Phases of the vision tower."""
REDUCER_PHASES = ("signal capture", "reducer", "rewrite")
"""Phases that a reducer adds to the call."""
DECODE = "decode"
"""The phase from the first token on."""
PREPROCESS = "preprocess"
"""The phase that converts images and text to tensors on the device, before the call; equal for all variants."""
PHASES = (PREPROCESS, *FIRST_TOKEN_PHASES, DECODE)
MEANING = {
    PREPROCESS: "images and text become tensors on the device",
    "vision encode": "the vision tower, with the strategies inside it",
    "signal capture": "reading the signals that a reducer needs, and laying them out by image",
    "projector": "from the tower's width to the LLM's width",
    "packing": "unpadding and newline tokens: the remaining part of `get_image_features`",
    "reducer": "choosing tokens",
    "rewrite": "the shorter prompt",
    "generate": "the part of `generate` before the first token that belongs to no other phase",
    "prefill": "the first forward pass of the LLM",
    DECODE: "all time after the first token",
}
"""Description of each phase, for reports."""

ADAPTER_PHASES: Mapping[type, Mapping[str, str]] = {
    Adapter: {"encode": "signal capture"},
    PlaceholderAdapter: {"split_by_image": "signal capture"},
    ReadsQuestion: {"read_questions": "signal capture", "embed_question": "signal capture"},
    Resizable: {"build_unencoded": "signal capture", "encode_resized": "packing"},
}
"""Phase of each timed method of an adapter, by the class that declares the method."""


class PhaseTimer:
    """Books each increase of a reading to the innermost open phase.

    Args:
        read: returns a number that never decreases.
    """

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.spent: dict[str, float] = {}
        """Total of each phase so far."""
        self._open = ["generate"]
        self._last = read()

    def start(self) -> None:
        """Reset the reference point; earlier time is attributed to no phase."""
        self._last = self.read()

    def flush(self) -> None:
        """Book the increase since the last reading to the open phase."""
        now = self.read()
        self.spent[self._open[-1]] = self.spent.get(self._open[-1], 0) + now - self._last
        self._last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the increase inside the block to a phase, except the shares of nested phases."""
        is_new = self._open[-1] != name  # a phase inside itself needs no reading, which would wait for the device
        if is_new:
            self.flush()
        self._open.append(name)
        try:
            # Profilers show this range; without a profiler it costs almost nothing.
            with record_function(f"phase: {name}") if is_new else nullcontext():
                yield
        finally:
            if is_new:
                self.flush()
            self._open.pop()

    def start_decoding(self) -> None:
        """Book all time outside explicit phases to decoding from now on."""
        self.flush()
        self._open[0] = DECODE

    @property
    def is_decoding(self) -> bool:
        """Whether the first token has been generated."""
        return self._open[0] == DECODE


@contextmanager
def instrument(
    adapter: Adapter,
    timer: PhaseTimer,
    pipeline: Pipeline | None = None,
    on_forward: Callable[[Any], None] | None = None,
) -> Iterator[None]:
    """Book the phases of all calls of a model inside the block.

    Args:
        adapter: the adapter of the model.
        timer: books the phases.
        pipeline: the pipeline of the attached strategy; None if the model runs without a strategy.
        on_forward: receives the output of each forward pass of the model.

    Raises:
        AttributeError: if `ADAPTER_PHASES` names a method that the adapter does not have.
    """
    model = adapter.model
    with ExitStack() as undo:

        def wrap_phase(target: Any, name: str, phase: str, on_result: Callable[[Any], None] | None = None) -> None:
            original, is_instance_attribute = getattr(target, name), name in vars(target)

            @wraps(original)  # generate and adapters read signatures
            def timed_method(*args: Any, **kwargs: Any) -> Any:
                with timer.phase(DECODE if timer.is_decoding else phase):
                    result = original(*args, **kwargs)
                if on_result is not None:
                    on_result(result)
                return result

            if is_instance_attribute:
                undo.callback(setattr, target, name, original)
            else:
                undo.callback(delattr, target, name)
            setattr(target, name, timed_method)

        wrap_phase(model, "forward", "prefill", on_forward)
        wrap_phase(model.base_model, "get_image_features", "packing")
        if isinstance(adapter, TowerAdapter):
            merger = getattr(adapter.tower, "merger", None)  # Qwen's projector is part of the tower
            # The parts as well, because a truncated tower never calls the tower itself.
            for module in [adapter.tower, *adapter.tower.children(), *adapter.tower_layers]:
                if module is not merger:
                    wrap_phase(module, "forward", "vision encode")
            compiled = getattr(adapter, "compiled_tower", None)
            if compiled is not None:  # its graph contains the capture
                wrap_phase(compiled, "run", "vision encode")
            if merger is not None:
                wrap_phase(merger, "forward", "projector")
            if adapter.projector_path is not None:
                wrap_phase(attrgetter(adapter.projector_path)(model.base_model), "forward", "projector")
        if pipeline is not None:
            wrap_phase(pipeline, "prepare", "rewrite")
            for selector in (pipeline.pixel_selector, pipeline.batch_selector, pipeline.decoder):
                if selector is not None:
                    wrap_phase(selector, "select", "reducer")
            for kind, phases in ADAPTER_PHASES.items():
                if isinstance(adapter, kind):
                    for name, phase in phases.items():
                        wrap_phase(adapter, name, phase)
            undo.enter_context(_time_capture(timer))
        yield


@contextmanager
def _time_capture(timer: PhaseTimer) -> Iterator[None]:
    """Book the capture inside attention modules to its own phase, apart from the attention kernel that follows it."""
    token = CAPTURE_CONTEXT.set(partial(timer.phase, "signal capture"))
    try:
        yield
    finally:
        CAPTURE_CONTEXT.reset(token)
