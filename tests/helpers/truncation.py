"""Functions that compare a truncated encoding with the complete encoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.pipeline import Pipeline
from tokenprune.prepared_call import PreparedCall
from tokenprune.reducer import TokenReducer


def prepare_both(
    adapter: PlaceholderAdapter, reducer: TokenReducer, inputs: dict[str, Any], for_generate: bool = True
) -> tuple[PreparedCall, PreparedCall]:
    """Prepare a call with a complete encoding and with a truncated encoding."""
    first, second = (Pipeline(reducer, adapter, question="what is it") for _ in range(2))
    with torch.no_grad():
        complete = first.prepare(inputs, for_generate=for_generate, encoding=first.encode(inputs))
        return complete, second.prepare(inputs, for_generate=for_generate)


@contextmanager
def count_calls(modules: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Count the calls of each module."""
    runs = dict.fromkeys(modules, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    hooks = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()
