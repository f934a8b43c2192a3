"""Divides what a call spends over its phases, without changing the call.

A ledger reads something that only grows: the clock, or a count of FLOPs. What it grows by belongs to the innermost
phase that is open. So phases never overlap, and they add up to the whole. `watched` opens and closes them around the
public stations of a model, its adapter and a run: it puts wrappers on these objects and takes them off again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from operator import attrgetter
from typing import Any

from torch.profiler import record_function
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenprune.adapter import Adapter
from tokenprune.models._capture.hooks import PROBE
from tokenprune.pipeline import Pipeline

BEFORE = ("vision encode", "signal capture", "projector", "packing", "reducer", "rewrite", "generate", "prefill")
"""Phases of a call up to its first token."""
ENCODE = BEFORE[:6]
"""Those that make what enters the LLM."""
OWN = ("signal capture", "reducer", "rewrite")
"""What a reducer adds to the call."""
DECODE = "decode"
"""Everything from the first token on."""
PREPROCESS = "preprocess"
"""Images and text become tensors on the device; outside of a call, and the same for all."""
PHASES = (PREPROCESS, *BEFORE, DECODE)
MEANING = {
    PREPROCESS: "images and text become tensors on the device",
    "vision encode": "the vision tower",
    "signal capture": "reading the signals that a reducer needs, and laying them out by image",
    "projector": "from the tower's width to that of the LLM",
    "packing": "unpadding and newline tokens: what is left of `get_image_features`",
    "reducer": "choosing tokens",
    "rewrite": "the shorter prompt",
    "generate": "what `generate` does before the first token, and whatever no other phase claims",
    "prefill": "the first forward pass of the LLM",
    DECODE: "everything from the first token on",
}
"""What each phase holds."""


class PhaseTimer:
    """Books what a reading grows by to the innermost open phase.

    Args:
        read: returns a number that never falls.
    """

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.spent: dict[str, float] = {}
        """What each phase has spent so far."""
        self._open = ["generate"]
        self._last = read()

    def start(self) -> None:
        """Begin here: what was spent before belongs to nobody."""
        self._last = self.read()

    def flush(self) -> None:
        """Book everything up to now."""
        now = self.read()
        self.spent[self._open[-1]] = self.spent.get(self._open[-1], 0) + now - self._last
        self._last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book what the block spends to a phase, without what phases inside it spend."""
        new = self._open[-1] != name  # a phase inside itself needs no reading, which waits for the device
        if new:
            self.flush()
        self._open.append(name)
        try:
            with record_function(f"phase: {name}") if new else nullcontext():  # seen by profilers, else nearly free
                yield
        finally:
            if new:
                self.flush()
            self._open.pop()

    def first_token(self) -> None:
        """From now on, everything that no phase claims is decoding."""
        self.flush()
        self._open[0] = DECODE

    @property
    def decoding(self) -> bool:
        """Whether the first token is there."""
        return self._open[0] == DECODE


@contextmanager
def instrument(
    adapter: Adapter,
    ledger: PhaseTimer,
    pipeline: Pipeline | None = None,
    forwarded: Callable[[Any], None] | None = None,
) -> Iterator[None]:
    """Book the phases of whatever goes through a model inside the block.

    Args:
        adapter: the adapter of the model.
        ledger: takes the bookings.
        pipeline: the attached strategy; None if the model runs plain.
        forwarded: is given the output of each forward pass of the model.
    """
    model = adapter.model
    with ExitStack() as undo:

        def wrap_phase(owner: Any, name: str, phase: str, seen: Callable[[Any], None] | None = None) -> None:
            original, own = getattr(owner, name), name in vars(owner)

            @functools.wraps(original)  # generate and adapters read signatures
            def booked(*args: Any, **kwargs: Any) -> Any:
                with ledger.phase(DECODE if ledger.decoding else phase):
                    out = original(*args, **kwargs)
                if seen is not None:
                    seen(out)
                return out

            undo.callback(setattr, owner, name, original) if own else undo.callback(delattr, owner, name)
            setattr(owner, name, booked)

        wrap_phase(model, "forward", "prefill", forwarded)
        wrap_phase(model.base_model, "get_image_features", "packing")
        tower: Any = getattr(adapter, "tower", None)
        merger = getattr(tower, "merger", None)  # Qwen's projector is part of the tower
        parts = [] if tower is None else [tower, *tower.children(), *getattr(adapter, "tower_layers", ())]
        for module in parts:  # the parts too, for whoever runs no more of a tower than is needed
            if module is not merger:
                wrap_phase(module, "forward", "vision encode")
        if merger is not None:
            wrap_phase(merger, "forward", "projector")
        if place := getattr(adapter, "projector_path", None):
            wrap_phase(attrgetter(place)(model.base_model), "forward", "projector")
        if pipeline is not None:
            wrap_phase(pipeline, "prepare", "rewrite")
            for name in ("encode", "unencoded", "split_by_image", "read_questions", "embed_question"):
                if hasattr(adapter, name):
                    wrap_phase(adapter, name, "signal capture")
            wrap_phase(pipeline.reducer, "reduce", "reducer")
            wrap_phase(adapter, "encode_resized", "packing")
            undo.enter_context(_capture_booked(ledger))
        yield


@contextmanager
def _capture_booked(ledger: PhaseTimer) -> Iterator[None]:
    """Book what the probe reads inside attention modules, apart from the kernel that it hands on to."""
    probed = ALL_ATTENTION_FUNCTIONS[PROBE]

    def booked(module: Any, *args: Any, **kwargs: Any) -> Any:
        probing = module.config  # a copy that the probe made for itself
        record = probing.tokenprune_record

        def recorded(*read: Any) -> None:
            with ledger.phase("signal capture"):
                record(*read)

        probing.tokenprune_record = recorded
        try:
            return probed(module, *args, **kwargs)
        finally:
            probing.tokenprune_record = record

    AttentionInterface.register(PROBE, booked)
    try:
        yield
    finally:
        AttentionInterface.register(PROBE, probed)
