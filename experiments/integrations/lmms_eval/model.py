"""An lmms-eval model that runs another lmms-eval model with a strategy attached. Importing it requires lmms-eval."""

from __future__ import annotations

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
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from lmms_eval.models import get_model  # type: ignore[import-not-found]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # type: ignore[import-not-found]
from loguru import logger  # type: ignore[import-not-found]

import tokenprune
from tokenprune.adapter import find_adapter
from tokenprune.cli import options
from tokenprune.configuration import as_config
from tokenprune.policies import Configurable
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run

PREFIX = "reducer."
"""Prefix of the model arguments that are parameters of the strategy."""
SOURCES = ("", "strategies", "strategies/components", "models", "models/_base", "models/_capture")
"""Folders of the package whose code can change an answer."""


class _StopError(BaseException):
    """Ends a wrapper's loop at once. It is no `Exception`, since wrappers catch these and return an empty answer."""


def to_cli_value(value: Any) -> str:
    """Return a model argument as text for the command line.

    Args:
        value: the result of lmms-eval's parser: an int for digits, a float for other numbers, otherwise text.
    """
    if isinstance(value, float) and value.is_integer() and value < 0:  # lmms-eval's parser reads -2 as the float -2.0
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)


def parse_reducer(arguments: Mapping[str, Any]) -> TokenReducer:
    """Return the strategy of a set of model arguments.

    Args:
        arguments: ``reducer``, ``reducer.NAME`` and ``plugin``, as on tokenprune's command line but without dashes.

    Raises:
        ValueError: if a name, a parameter or a value is not valid; the error is one line that names the argument.
    """
    words = [word for name, value in arguments.items() for word in (f"--{name}", to_cli_value(value))]
    try:
        return options.parse_reducer(words)
    except ValueError as error:
        raise ValueError(f"--model_args: {error}") from error


def _iterate_parts(reducer: Any) -> Iterator[Any]:
    """Yield a strategy and its components, nested components included."""
    yield reducer
    for field in fields(reducer):
        value = getattr(reducer, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from _iterate_parts(value)


def compute_fingerprint(reducer: TokenReducer) -> str:
    """Return a short hash of the parameters and the code of a strategy, which can change an answer.

    The code covers the package and the files that define the classes of the strategy and their bases. Modules that
    such a file imports are not included.

    Args:
        reducer: the strategy.
    """
    root = Path(tokenprune.__file__).parent
    files = {file for folder in SOURCES for file in (root / folder).glob("*.py")}
    for part in _iterate_parts(reducer):
        modules = [sys.modules[base.__module__] for base in type(part).__mro__ if issubclass(base, Configurable)]
        files |= {Path(str(module.__file__)) for module in modules}
    sources = {file.resolve() for file in files}
    code = hashlib.sha256(json.dumps(as_config(reducer), sort_keys=True, default=str).encode())
    for digest in sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in sources):
        code.update(digest.encode())
    return f"tp-{code.hexdigest()[:12]}"  # with the prefix, lmms-eval does not read it as a number


@contextmanager
def raise_generate_errors(model: Any) -> Iterator[None]:
    """Raise errors of `generate` inside the block, even if a wrapper catches them.

    Args:
        model: the transformers model.

    Raises:
        RuntimeError: if `generate` raised an error.
    """
    original, failures = model.generate, []

    def generate(*args: Any, **kwargs: Any) -> Any:
        """Generate, and record an error before the wrapper can catch it."""
        try:
            return original(*args, **kwargs)
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
        model.generate = original
    if failures:
        first = failures[0]
        raise RuntimeError(
            f"generate failed, and nothing was scored: {type(first).__name__}: {first}. Without tokenprune, the "
            "lmms-eval wrapper returns an empty answer instead"
        ) from first


def copy_request(request: Any) -> Any:
    """Return a copy of a request with its own generation arguments, since wrappers write into them.

    lmms-eval computes the key of its response cache from the arguments before and after the call. If they changed, the
    cached answer is never read.
    """
    duplicate = copy.copy(request)
    duplicate.arguments = tuple(
        copy.deepcopy(argument) if isinstance(argument, dict) else argument for argument in request.args
    )
    return duplicate


def choose_device(base: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return `device` and `device_map` arguments of a wrapper, if they are not set and its defaults do not work.

    Args:
        base: the wrapper class.
        arguments: the arguments that are set.
    """
    parameters = inspect.signature(base).parameters
    placement: dict[str, str] = {}
    device = str(arguments.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_single_process = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if "device" in parameters and "device" not in arguments:
        placement["device"] = device
    if "device_map" in parameters and parameters["device_map"].default == "" and "device_map" not in arguments:
        # transformers 5 rejects the default "". Several processes on GPUs need it, since it divides the GPUs.
        placement |= {"device_map": device} if is_single_process or device == "cpu" else {}
    return placement


class _TokenPrune(lmms):  # type: ignore[misc]
    """Runs another lmms-eval model with a strategy attached.

    Args:
        base: name of the lmms-eval model; it must hold a transformers model in ``.model``.
        reducer: the strategy: class name, kebab-case alias, preset or ``file.py:Class``.
        budget: short for ``reducer.budget``, e.g. ``0.2``, ``20%`` or ``160``.
        plugin: Python file whose classes are available by name.
        fingerprint: expected fingerprint of strategy and code. If it is set, a response cache never mixes strategies.
        options: ``reducer.NAME`` are parameters of the strategy, all others are arguments of the lmms-eval model.
    """

    def __init__(
        self,
        base: str = "llava_hf",
        reducer: Any = "HiRED",
        budget: Any = None,
        plugin: str | None = None,
        fingerprint: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        strategy_options = {name: value for name, value in options.items() if name.startswith(PREFIX)}
        options = {name: value for name, value in options.items() if name not in strategy_options}
        if budget is not None and f"{PREFIX}budget" in strategy_options:
            raise ValueError("--model_args: budget and reducer.budget are the same; give one of them")
        strategy_options |= {} if budget is None else {f"{PREFIX}budget": budget}
        plugin_options = {} if plugin is None else {"plugin": plugin}
        self.reducer = parse_reducer({**plugin_options, "reducer": reducer, **strategy_options})
        self.fingerprint = compute_fingerprint(self.reducer)
        if fingerprint not in (None, self.fingerprint):
            raise ValueError(
                f"--model_args: fingerprint={fingerprint} does not match this strategy and code: answers cached under "
                f"it belong to another strategy. Write fingerprint={self.fingerprint}"
            )
        wrapper = get_model(base, force_simple=self.is_simple)
        if wrapper.is_simple != self.is_simple:
            required, available = ("simple", "chat") if self.is_simple else ("chat", "simple")
            hint = "omit --force_simple" if self.is_simple else "add --force_simple"
            raise ValueError(f"--model_args: base={base} has no {required} class, only a {available} one; {hint}")
        self._inner = wrapper(**options, **choose_device(wrapper, options))
        if not hasattr(self._inner, "model"):
            raise ValueError(f"--model_args: base={base} holds no transformers model in .model; use llava_hf")
        find_adapter(self._inner.model)  # raises for an unsupported model family before the first question
        # The evaluator sets and reads these two attributes on the outer model.
        self._rank, self._world_size = self._inner.rank, self._inner.world_size
        logger.info(f"tokenprune: {self.reducer.label} on {base}, fingerprint={self.fingerprint}")

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapper that the evaluator reads: device, accelerator, tokenizer, ..."""
        if name == "_inner":  # not set yet
            raise AttributeError(name)
        return getattr(self._inner, name)

    def _answer(self, method: str, requests: Sequence[Any]) -> Any:
        """Answer requests by a method of the wrapper, with the strategy attached.

        Raises:
            RuntimeError: if `generate` failed, or no image went through the model.
        """
        if not requests:  # a process without requests need not attach the strategy
            return []
        inner = self._inner
        inner.task_dict, inner.cache_hook = self.task_dict, self.cache_hook
        inner._rank, inner._world_size = self._rank, self._world_size
        tokenizer = getattr(inner, "tokenizer", None)
        with self.reducer(inner.model, tokenizer=tokenizer, strict=True) as run, raise_generate_errors(inner.model):
            answers = getattr(inner, method)([copy_request(request) for request in requests])
        self._log_account(run)
        return answers

    def _log_account(self, run: Run) -> None:
        """Log the token counts; ``throughput`` of results.json holds them as averages per image and per prompt."""
        total = run.account.summary()
        logger.info(f"tokenprune: rank {self.rank}: {run.account}")
        per_image = {f"tokens_{name}": total[name] / total["images"] for name in ("asked", "kept", "valid")}
        prompts = run.account.row_count
        per_prompt = {name: total[name] / prompts for name in ("prompt_length", "prompt_length_full")}
        per_prompt["average_tokens"] = total["average_tokens"]
        log_metrics(0, 0, 0, additional_metrics={**per_image, **per_prompt})

    def generate_until(self, requests: Sequence[Any]) -> Any:
        """Answer questions freely."""
        return self._answer("generate_until", requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Answer questions in several rounds, if the wrapper supports it."""
        return self._answer("generate_until_multi_round", requests)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Score given answers."""
        return self._answer("loglikelihood", requests)

    def clean(self) -> None:
        """Release the model; the evaluator requires it after each evaluation."""
        self._inner.clean()


class TokenPruneSimple(_TokenPrune):
    """The plug-in for wrappers whose requests hold a text and images."""

    is_simple = True


class TokenPruneChat(_TokenPrune):
    """The plug-in for wrappers whose requests hold chat messages."""

    is_simple = False
