"""An lmms-eval model that runs another one with a strategy attached. It cannot be imported without lmms-eval."""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from lmms_eval.models import get_model  # type: ignore[import-not-found]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # type: ignore[import-not-found]
from loguru import logger  # type: ignore[import-not-found]

import tokenprune
from tokenprune.adapter import find_adapter
from tokenprune.cli.parsing import format_error, prepare
from tokenprune.configuration import as_config
from tokenprune.policies import Configurable
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run

PREFIX = "reducer."
"""Model arguments that begin so are parameters of the strategy."""
SOURCES = ("", "strategies", "models")
"""Folders of the package whose code decides about answers."""


class _StopError(BaseException):
    """Ends a wrapper's loop at once; no `Exception`, since wrappers catch these and answer with an empty text."""


def as_word(value: Any) -> str:
    """Return a model argument as the command line has it.

    Args:
        value: what lmms-eval's own parser made of it: digits are an int, other numbers a float, the rest is text.
    """
    if isinstance(value, float) and value.is_integer() and value < 0:  # its parser takes -2 for the float -2.0
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)


def reducer_of(arguments: Mapping[str, Any]) -> TokenReducer:
    """Return the strategy that model arguments describe.

    Args:
        arguments: ``reducer``, ``reducer.NAME`` and ``plugin``, as on tokenprune's own command line without dashes.

    Raises:
        ValueError: if a name, a parameter or a value is not valid; one line that names the place.
    """
    parser = ArgumentParser(prog="--model_args", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--plugin", type=list[str], default=[])
    parser.add_argument("--reducer", type=TokenReducer)
    words = [word for name, value in arguments.items() for word in (f"--{name}", as_word(value))]
    try:
        reducer: TokenReducer = parser.instantiate(parser.parse_args(prepare(words))).reducer
    except (LookupError, ValueError, TypeError, argparse.ArgumentError) as error:
        raise ValueError(f"--model_args: {format_error(error)}") from error
    return reducer


def _parts(reducer: Any) -> Iterator[Any]:
    """Yield a strategy and, at any depth, the parts that it is made of."""
    yield reducer
    for field in fields(reducer):
        value = getattr(reducer, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from _parts(value)


def fingerprint_of(reducer: TokenReducer) -> str:
    """Return a short name of everything in a strategy that can change an answer: its parameters and its code.

    The code is that of the package and of the files in which the classes of the strategy and their bases stand. What
    such a file imports from elsewhere is not looked at.

    Args:
        reducer: the strategy.
    """
    root = Path(tokenprune.__file__).parent
    files = {file for folder in SOURCES for file in (root / folder).glob("*.py")}
    files |= set((root / "strategies" / "components").glob("*.py"))
    for part in _parts(reducer):
        modules = [sys.modules[base.__module__] for base in type(part).__mro__ if issubclass(base, Configurable)]
        files |= {Path(str(module.__file__)) for module in modules}
    ours = {file.resolve() for file in files}
    code = hashlib.sha256(json.dumps(as_config(reducer), sort_keys=True, default=str).encode())
    for digest in sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in ours):
        code.update(digest.encode())
    return f"tp-{code.hexdigest()[:12]}"  # the letters keep lmms-eval from reading it as a number


@contextmanager
def errors_surface(model: Any) -> Iterator[None]:
    """Let no wrapper swallow an error of `generate` inside the block.

    Args:
        model: the transformers model.

    Raises:
        RuntimeError: if `generate` raised, whatever the wrapper did about it.
    """
    own, failures = model.generate, []

    def generate(*args: Any, **kwargs: Any) -> Any:
        """Generate, and note an error before anyone can catch it."""
        try:
            return own(*args, **kwargs)
        except Exception as error:
            failures.append(error)
            raise _StopError from error

    model.generate = generate
    try:
        yield
    except (Exception, _StopError):
        if not failures:
            raise
    finally:
        model.generate = own
    if failures:
        first = failures[0]
        raise RuntimeError(
            f"generate failed, and nothing was scored: {type(first).__name__}: {first}. The lmms-eval wrapper itself "
            "would have answered with an empty text"
        ) from first


def own_copy(request: Any) -> Any:
    """Return a request whose generation arguments a wrapper may write into, which it does.

    lmms-eval computes the key of its response cache from them before and after; changed ones are never found again.
    """
    own = copy.copy(request)
    own.arguments = tuple(copy.deepcopy(one) if isinstance(one, dict) else one for one in request.args)
    return own


def placement(base: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, str]:
    """Return where the model goes, if it was not said and the wrapper's own default does not work.

    Args:
        base: the wrapper class.
        given: its arguments.
    """
    known = inspect.signature(base).parameters
    place: dict[str, str] = {}
    device = str(given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if "device" in known and "device" not in given:
        place["device"] = device
    if "device_map" in known and known["device_map"].default == "" and "device_map" not in given:
        # transformers 5 refuses the default ""; several processes on GPUs need it, it divides the GPUs among them.
        place |= {"device_map": device} if alone or device == "cpu" else {}
    return place


class _TokenPrune(lmms):  # type: ignore[misc]
    """Delegates to another lmms-eval model and attaches a strategy while it answers.

    Args:
        base: name of the lmms-eval model; it must hold a transformers model in ``.model``.
        reducer: the strategy: class name, kebab-case alias, preset or ``file.py:Class``.
        budget: short for ``reducer.budget``, e.g. ``0.2``, ``20%`` or ``160``.
        plugin: Python file whose classes get known by name.
        fingerprint: must be that of strategy and code, if given; makes answers in a response cache safe.
        rest: ``reducer.NAME`` are parameters of the strategy, all others arguments of the lmms-eval model.
    """

    def __init__(
        self,
        base: str = "llava_hf",
        reducer: Any = "HiRED",
        budget: Any = None,
        plugin: str | None = None,
        fingerprint: Any = None,
        **rest: Any,
    ) -> None:
        super().__init__()
        own = {name: value for name, value in rest.items() if name.startswith(PREFIX)}
        rest = {name: value for name, value in rest.items() if name not in own}
        if budget is not None and f"{PREFIX}budget" in own:
            raise ValueError("--model_args: budget and reducer.budget are the same; give one of them")
        own |= {} if budget is None else {f"{PREFIX}budget": budget}
        named = {} if plugin is None else {"plugin": plugin}
        self.reducer = reducer_of({**named, "reducer": reducer, **own})
        self.fingerprint = fingerprint_of(self.reducer)
        if fingerprint not in (None, self.fingerprint):
            raise ValueError(
                f"--model_args: fingerprint={fingerprint} is not that of this strategy and code: answers cached under "
                f"it are not theirs. Write fingerprint={self.fingerprint}"
            )
        found = get_model(base, force_simple=self.is_simple)
        if found.is_simple != self.is_simple:
            here, there = ("simple", "chat") if self.is_simple else ("chat", "simple")
            hint = "leave --force_simple out" if self.is_simple else "add --force_simple"
            raise ValueError(f"--model_args: base={base} has no {here} class, only a {there} one; {hint}")
        self._inner = found(**rest, **placement(found, rest))
        if not hasattr(self._inner, "model"):
            raise ValueError(f"--model_args: base={base} holds no transformers model in .model; take llava_hf")
        find_adapter(self._inner.model)  # an unsupported family is answered before the first question
        # The evaluator sets these two on the outer model, and reads them there.
        self._rank, self._world_size = self._inner.rank, self._inner.world_size
        logger.info(f"tokenprune: {type(self.reducer).__name__} on {base}, fingerprint={self.fingerprint}")

    def __getattr__(self, name: str) -> Any:
        """Return what the evaluator asks for and only the wrapper has: device, accelerator, tokenizer, ..."""
        if name == "_inner":  # not there yet
            raise AttributeError(name)
        return getattr(self._inner, name)

    def _answers(self, method: str, requests: Sequence[Any]) -> Any:
        """Answer requests by a method of the wrapper, with the strategy attached.

        Raises:
            RuntimeError: if `generate` failed, or no image went through the model.
        """
        if not requests:  # a process without a share has nothing to attach for
            return []
        inner = self._inner
        inner.task_dict, inner.cache_hook = self.task_dict, self.cache_hook
        inner._rank, inner._world_size = self._rank, self._world_size
        tokenizer = getattr(inner, "tokenizer", None)
        with self.reducer(inner.model, tokenizer=tokenizer, strict=True) as run, errors_surface(inner.model):
            answers = getattr(inner, method)([own_copy(request) for request in requests])
        self._tell(run)
        return answers

    def _tell(self, run: Run) -> None:
        """Log what was kept; in results.json it stands under ``throughput``, as averages an image or prompt."""
        total = run.account.summary()
        logger.info(f"tokenprune: rank {self.rank}: {run.account}")
        per_image = {f"tokens_{name}": total[name] / total["images"] for name in ("asked", "kept", "valid")}
        prompts = run.account.row_count
        per_prompt = {name: total[name] / prompts for name in ("prompt_length", "prompt_length_full")}
        log_metrics(0, 0, 0, additional_metrics={**per_image, **per_prompt})

    def generate_until(self, requests: Sequence[Any]) -> Any:
        """Answer questions freely."""
        return self._answers("generate_until", requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Answer questions in rounds, if the wrapper can."""
        return self._answers("generate_until_multi_round", requests)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Score given answers."""
        return self._answers("loglikelihood", requests)

    def clean(self) -> None:
        """Let go of the model, which the evaluator wants after each evaluation."""
        self._inner.clean()


class TokenPruneSimple(_TokenPrune):
    """The plug-in for wrappers that get a text and images."""

    is_simple = True


class TokenPruneChat(_TokenPrune):
    """The plug-in for wrappers that get chat messages."""

    is_simple = False
